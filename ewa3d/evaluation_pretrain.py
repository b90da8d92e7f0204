"""Metrics of pretraining: how well clouds are reconstructed or codes guessed, how much of a vocabulary is used."""
from collections.abc import Mapping, Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric
from torch import Tensor

from ewa3d.checks import check_integer
from ewa3d.models.dvae import code_usage, count_codes
from ewa3d.ops.chamfer import chamfer_distance
from ewa3d.registry import METRICS, nearest

__all__ = ['CodeUsage', 'ReconstructionError', 'SummedMetric', 'TokenAccuracy']


class SummedMetric(BaseMetric):
    """A metric of sums over samples: ``self.sums`` is a float64 tensor, added up over batches and ranks."""
    default_prefix = ''

    def __init__(self, prefix: str | None = None):
        super().__init__(collect_device='cpu', prefix=prefix)
        self.sums: Tensor | None = None
        self.count = 0

    def add(self, values: Tensor) -> None:
        """Count one sample."""
        values = values.double()
        self.sums = values if self.sums is None else self.sums + values
        self.count += 1

    def evaluate(self, size: int) -> dict[str, float]:
        """Sum over ranks, compute, and start again.

        Args:
            size: number of samples in the data set.

        Raises:
            ValueError: there is nothing to evaluate, or a sampler repeated samples.
        """
        count = torch.tensor(self.count)
        all_reduce(count, 'sum')
        if not 0 < int(count) <= size:
            raise ValueError(f'{type(self).__name__}: {int(count)} samples were evaluated and the data set has {size}; '
                             "a sampler must give each once: dict(type='DefaultSampler', shuffle=False, "
                             'round_up=False)')
        sums = self.sums if self.sums is not None else torch.zeros(self.size(), dtype=torch.float64)
        all_reduce(sums, 'sum')
        self.sums, self.count = None, 0
        metrics = self.compute_metrics((sums, int(count)))
        return {f'{self.prefix}/{k}' if self.prefix else k: v for k, v in metrics.items()}

    def size(self) -> int:
        """The number of sums: a rank may have no sample at all."""
        raise NotImplementedError

    def field(self, sample: Mapping, key: str) -> Tensor:
        """An entry of a sample, with an error that names both."""
        if key not in sample:
            raise KeyError(f'{type(self).__name__}: sample {_name(sample)} needs {key!r}; {nearest(key, sample)}')
        return torch.as_tensor(sample[key])


@METRICS.register_module()
class ReconstructionError(SummedMetric):
    """Chamfer distances between reconstructed clouds and what the model was given, times 1000 as they are published:
    ``CD-L1`` (half the sum of mean distances) and ``CD-L2`` (the sum of mean squared distances), means over the clouds.

    Each sample has ``pred_points`` ``(M, 3)``; the input is taken from the batch.

    Args:
        prefix: stands before the names of the numbers, ``PREFIX/CD-L1``.

    Raises:
        KeyError, ValueError: a sample without a reconstruction, nothing to evaluate, or more samples than the data set
            has.
    """

    def process(self, data_batch: Mapping, data_samples: Sequence[Mapping]) -> None:
        """Count one batch."""
        for points, sample in zip(data_batch['inputs']['points'], data_samples):
            cloud, points = self.field(sample, 'pred_points').cpu()[None], points[None, :, :3].cpu()
            self.add(torch.stack([chamfer_distance(cloud, points, norm=norm) for norm in ('l1', 'l2')]))

    def size(self) -> int:
        return 2

    def compute_metrics(self, results: tuple[Tensor, int]) -> dict[str, float]:
        """The metrics from the sums ``(2,)`` and the number of samples."""
        sums, count = results
        return {name: 1000 * float(value) / count for name, value in zip(('CD-L1', 'CD-L2'), sums)}


@METRICS.register_module()
class CodeUsage(SummedMetric):
    """How much of its vocabulary a tokenizer uses over a data set: ``codes_used`` in percent of all codes,
    ``codes`` their number, and ``code_perplexity``, the number of codes that an even use would need.

    Each sample has ``pred_tokens`` ``(G,)``.

    Args:
        prefix: stands before the names of the numbers.
        num_tokens: size of the vocabulary.

    Raises:
        KeyError, ValueError: a sample without tokens, a token outside the vocabulary, nothing to evaluate, or more
            samples than the data set has.
    """

    def __init__(self, num_tokens: int, prefix: str | None = None):
        super().__init__(prefix)
        self.num_tokens = check_integer('CodeUsage: num_tokens', num_tokens, 1)

    def process(self, data_batch, data_samples: Sequence[Mapping]) -> None:
        """Count one batch."""
        for sample in data_samples:
            tokens = self.field(sample, 'pred_tokens').cpu().long()
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.num_tokens:
                raise ValueError(f'CodeUsage: sample {_name(sample)} has tokens from {low} to {high}, outside of '
                                 f'0 … {self.num_tokens - 1}; is num_tokens that of the model?')
            self.add(count_codes(tokens, self.num_tokens))

    def size(self) -> int:
        return self.num_tokens

    def compute_metrics(self, results: tuple[Tensor, int]) -> dict[str, float]:
        """The metrics from the counts ``(num_tokens,)``."""
        counts = results[0]
        used, perplexity = code_usage(counts)
        return dict(codes_used=float(used), codes=float((counts > 0).sum()), code_perplexity=float(perplexity))


@METRICS.register_module()
class TokenAccuracy(SummedMetric):
    """``token_acc``: the share of masked patches, in percent, for which the tokenizer's code was predicted.

    Each sample has ``pred_tokens``, ``gt_tokens`` and ``masked`` ``(G,)``.

    Args:
        prefix: stands before the name of the number.

    Raises:
        KeyError, ValueError: a sample without one of them, no masked patch, nothing to evaluate, or more samples than
            the data set has.
    """

    def process(self, data_batch, data_samples: Sequence[Mapping]) -> None:
        """Count one batch."""
        for sample in data_samples:
            pred, truth, masked = (self.field(sample, key) for key in ('pred_tokens', 'gt_tokens', 'masked'))
            self.add(torch.stack([(pred[masked] == truth[masked]).sum(), masked.sum()]))

    def size(self) -> int:
        return 2

    def compute_metrics(self, results: tuple[Tensor, int]) -> dict[str, float]:
        """The metric from the numbers of hits and of masked patches."""
        hits, masked = map(float, results[0])
        if not masked:
            raise ValueError('TokenAccuracy: no patch of the data set is masked')
        return dict(token_acc=100 * hits / masked)


def _name(sample: Mapping) -> str:
    return repr(sample.get('name', sample.get('index', '?')))
