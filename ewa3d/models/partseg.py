"""The head that gives every point of a cloud one of its parts."""
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import Pointwise, pointwise
from ewa3d.models.propagation import PointFeatures
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

__all__ = ['PartSegHead', 'parts_mask']


@MODELS.register_module()
class PartSegHead(nn.Module):
    """An MLP on the features of each point: log-probabilities of all parts of all categories.

    What a cloud's points have in common goes through the first layer once a cloud; its weight is kept as published,
    for the two joined.

    Args:
        num_parts: of all categories together; by default as many as ``parts`` names.
        in_channels: width of the features, of points and clouds together; ``TaskModel`` fills in what its neck gives.
        hidden: widths of the hidden layers: ``(512, 256)`` is Point-MAE's head, ``(128,)`` Point-BERT's.
        dropout: behind the first hidden layer.
        parts: the part numbers of each category, a dict in the order of the categories or a list; predictions of a
            cloud whose category is known are then parts of that category. The command line tools fill it in from the
            data set's metainfo.

    Shape:
        - feats :class:`~ewa3d.models.propagation.PointFeatures`; log-probabilities ``(B, N, num_parts)``.

    Raises:
        TypeError, ValueError: numbers missing or out of range, part labels that are missing, outside of the parts or
            not one a point.
    """

    def __init__(self, num_parts: int | None = None, in_channels: int | None = None,
                 hidden: Sequence[int] = (512, 256), dropout: float = 0.5,
                 parts: Mapping[str, Sequence[int]] | Sequence[Sequence[int]] | None = None):
        super().__init__()
        parts = list(parts.values()) if isinstance(parts, Mapping) else parts
        if num_parts is None and parts is None:
            raise ValueError('PartSegHead: num_parts is not set. tools/train.py fills it in from the parts of the '
                             'training set; otherwise set model.head.num_parts')
        if in_channels is None:
            raise ValueError('PartSegHead: in_channels is not set (TaskModel fills it in from its neck)')
        if num_parts is None:
            num_parts = 1 + max(max(ids) for ids in parts)
        if not isinstance(hidden, Sequence) or not hidden:
            raise ValueError(f'PartSegHead: hidden must be the widths of hidden layers, got {hidden!r}')
        for name, value in (('num_parts', num_parts), ('in_channels', in_channels),
                            *(('each of hidden', width) for width in hidden)):
            check_integer(f'PartSegHead: {name}', value, 1)
        check_number('PartSegHead: dropout', dropout, '[0, 1]')
        self.num_parts, self.in_channels = num_parts, in_channels
        layers = []
        for i, (inputs, width) in enumerate(zip((in_channels, *hidden), hidden)):
            layers += [Pointwise(inputs, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
            layers += [nn.Dropout(dropout)] if i == 0 else []
        self.layers = nn.Sequential(*layers, Pointwise(hidden[-1], num_parts))
        self.register_buffer('allowed', None if parts is None else parts_mask(parts, num_parts), persistent=False)

    def forward(self, feats: PointFeatures) -> Tensor:
        x, shared = feats.x, feats.shared
        B, N, C = x.shape
        width = C + (0 if shared is None else shared.shape[1])
        if width != self.in_channels:
            raise ValueError(f'PartSegHead: features of {self.in_channels} channels expected, got {width}')
        first, *rest = self.layers
        if shared is None:
            x = first(x)
        else:
            x = pointwise(x, first.weight[:, :C]) + F.linear(shared, first.weight[:, C:], first.bias).unsqueeze(1)
        for layer in rest:  # linear layers have a quick kernel for (B, N, C), norms take rows
            x = layer(x.view(B, N, -1) if isinstance(layer, Pointwise) else x.flatten(0, -2))
        return x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1)

    def loss(self, feats: PointFeatures, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """``loss_seg`` over all points and, as a statistic, their accuracy ``acc`` in percent."""
        labels = self._labels(samples, feats.x.shape[1]).to(feats.x.device, non_blocking=True)
        scores = self(feats).flatten(0, 1)  # (B N, num_parts)
        accuracy = (scores.detach().argmax(1) == labels).float().mean() * 100
        return {'loss_seg': F.nll_loss(scores, labels), 'acc': accuracy}

    def predict(self, feats: PointFeatures, samples: Sequence[Sample] | None = None) -> list[Sample]:
        """The samples with ``part_scores`` (log-probabilities) ``(N, num_parts)`` and ``pred_parts`` ``(N,)``, on the
        CPU."""
        scores = self(feats)
        allowed = scores
        if feats.category is not None and self.allowed is not None:
            allowed = scores.masked_fill(~self.allowed[feats.category].unsqueeze(1), -torch.inf)
        labels, scores = allowed.argmax(-1).cpu(), scores.cpu()
        samples = [Sample() for _ in scores] if samples is None else list(samples)
        for sample, score, label in zip(samples, scores, labels):
            sample.part_scores, sample.pred_parts = score, label
        return samples

    def _labels(self, samples: Sequence[Sample], num_points: int) -> Tensor:
        for sample in samples:
            parts = sample.get('gt_parts')
            if parts is None or tuple(parts.shape) != (num_points,):
                found = 'none' if parts is None else f'the shape {tuple(parts.shape)}'
                raise ValueError(f'sample {_name(sample)}: gt_parts must be one part a point, ({num_points},), got '
                                 f'{found}')
        labels = torch.cat([torch.as_tensor(sample.gt_parts) for sample in samples]).long()
        if labels.device.type == 'cpu' and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_parts:
            wrong = next(s for s in samples if not ((s.gt_parts >= 0) & (s.gt_parts < self.num_parts)).all())
            raise ValueError(f'sample {_name(wrong)} has the part labels {int(wrong.gt_parts.min())} to '
                             f'{int(wrong.gt_parts.max())}; the head has {self.num_parts} parts, 0 to '
                             f'{self.num_parts - 1}')
        return labels


def parts_mask(parts: Sequence[Sequence[int]], num_parts: int) -> Tensor:
    """``(categories, num_parts)`` bool: which parts each category has.

    Raises:
        ValueError: a category without parts, or a part outside of ``num_parts``.
    """
    mask = torch.zeros(len(parts), num_parts, dtype=torch.bool)
    for row, ids in zip(mask, parts):
        ids = list(ids)
        if not ids or min(ids) < 0 or max(ids) >= num_parts:
            raise ValueError(f'the parts of a category must be some of 0 … {num_parts - 1}, got {ids}')
        row[ids] = True
    return mask


def _name(sample: Sample) -> str:
    return repr(sample.get('name', sample.get('index', '(unnamed)')))
