"""Metrics: streaming counts, never lists of points."""
import re
from collections.abc import Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from torch import Tensor

from ewa3d.registry import METRICS

__all__ = ['Accuracy', 'is_of_one_class']

PER_CLASS = re.compile(r'(acc|IoU|IoU_all|A[PR]\d+)/')


def is_of_one_class(key: str) -> bool:
    """Whether a metric is that of one class, ``acc/chair``: it goes into files and tables, not into summaries."""
    return PER_CLASS.search(key) is not None


@METRICS.register_module()
class Accuracy(BaseMetric):
    """Classification accuracy in percent: ``OA`` over all samples, ``mAcc`` as the mean over classes, ``acc/<class>``.

    Counts go into a confusion matrix (rows: truth); ``mAcc`` is the mean over the classes that occur in the data, and
    the log says so where some do not. Under DDP the counts are summed over ranks. After an evaluation its matrix is in
    ``last_confusion``.

    Each sample is a dict (or what ``BaseDataElement.to_dict`` gives) with ``gt_label`` and ``pred_label`` or
    ``pred_scores``.

    Args:
        num_classes: taken from the data set's ``metainfo['classes']`` by default.
        prefix: put before the names of the metrics, ``prefix/OA``.

    Raises:
        ValueError: no sample at all, scores that are not finite, a label out of range, or more samples than the data
            set has (a sampler that pads).
    """
    default_prefix = ''

    def __init__(self, num_classes: int | None = None, prefix: str | None = None):
        super().__init__(collect_device='cpu', prefix=prefix)
        self.num_classes = num_classes
        self.confusion: Tensor | None = None
        self.last_confusion: Tensor | None = None

    @staticmethod
    def metric_names(classes: Sequence[str] = (), prefix: str | None = None) -> list[str]:
        """What the metrics are called, for data with these classes."""
        names = ['OA', 'mAcc', *(f'acc/{name}' for name in classes)]
        return [f'{prefix}/{name}' for name in names] if prefix else names

    @property
    def classes(self) -> list[str] | None:
        """The names of the data set's classes, where it has them."""
        return list((self.dataset_meta or {}).get('classes') or []) or None

    def process(self, data_batch, data_samples: Sequence[dict]) -> None:
        """Count one batch."""
        for sample in data_samples:
            truth, guess, size = self._read(sample)
            self._grow(size)
            self.confusion[truth, guess] += 1

    def evaluate(self, size: int) -> dict[str, float]:
        """Sum the counts over ranks, compute, and start again.

        Args:
            size: number of samples in the data set.
        """
        counted = torch.tensor(self._size(), dtype=torch.int64)
        all_reduce(counted, 'max')
        self._grow(int(counted))
        confusion, self.confusion = self.confusion, None
        all_reduce(confusion, 'sum')
        total = int(confusion.sum())
        if total == 0:
            raise ValueError('Accuracy: there is nothing to evaluate; the data set or its split is empty')
        if total > size:
            raise ValueError(f'Accuracy: {total} samples were evaluated but the data set has {size}; the sampler '
                             'repeats some: set sampler=dict(type=\'DefaultSampler\', shuffle=False, round_up=False)')
        self.last_confusion = confusion
        metrics = self.compute_metrics(confusion)
        return {f'{self.prefix}/{k}' if self.prefix else k: v for k, v in metrics.items()}

    def compute_metrics(self, results: Tensor) -> dict[str, float]:
        """The metrics of a confusion matrix.

        Shape:
            - results: ``(K, K)`` counts, rows are the truth.
        """
        counts = results.double()
        support = counts.sum(1)
        occurs = support > 0
        recall = 100 * counts.diagonal() / support.clamp(min=1)
        names = self.classes or [str(i) for i in range(len(counts))]
        if not bool(occurs.all()):
            print_log(f'mAcc is the mean over {int(occurs.sum())} of {len(counts)} classes; the others have no sample',
                      logger='current')
        metrics = dict(OA=float(100 * counts.diagonal().sum() / counts.sum()), mAcc=float(recall[occurs].mean()))
        metrics.update({f'acc/{names[i]}': float(recall[i]) for i in occurs.nonzero().flatten().tolist()})
        return metrics

    def _size(self) -> int:
        known = self.num_classes or (len(self.classes) if self.classes else 0)
        return max(known, len(self.confusion) if self.confusion is not None else 0)

    def _grow(self, size: int) -> None:
        size = max(size, self._size())
        old = self.confusion
        if old is None or len(old) < size:
            self.confusion = torch.zeros(size, size, dtype=torch.int64)
            if old is not None:
                self.confusion[:len(old), :len(old)] = old

    def _read(self, sample: dict) -> tuple[int, int, int]:
        name = sample.get('name', sample.get('index', '?'))
        scores = sample.get('pred_scores')
        if scores is not None and not bool(torch.isfinite(torch.as_tensor(scores)).all()):
            raise ValueError(f'Accuracy: the scores of sample {name!r} are not finite; the model has diverged or '
                             'its input is bad')
        if 'gt_label' not in sample or ('pred_label' not in sample and scores is None):
            raise KeyError(f"Accuracy: sample {name!r} needs 'gt_label' and 'pred_label' or 'pred_scores', it has "
                           f'{sorted(map(str, sample))}')
        truth = int(sample['gt_label'])
        guess = int(sample['pred_label']) if 'pred_label' in sample else int(torch.as_tensor(scores).argmax())
        known = self.num_classes or (len(self.classes) if self.classes else 0)
        scored = len(scores) if scores is not None else 0
        limit = max(known, scored)
        if truth < 0 or guess < 0 or (known and truth >= known) or (limit and guess >= limit):
            raise ValueError(f'Accuracy: sample {name!r} has label {truth} and prediction {guess}, '
                             f'outside of 0 … {limit - 1}')
        return truth, guess, max(limit, truth + 1, guess + 1)
