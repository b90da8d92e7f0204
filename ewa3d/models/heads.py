"""Heads: ``forward(feats)`` gives raw outputs, ``loss(feats, samples)`` a dict, ``predict(feats, samples)`` samples."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import init_vit
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

__all__ = ['ClsHead']


@MODELS.register_module()
class ClsHead(nn.Module):
    """Classification from one vector.

    Args:
        dropout: behind each hidden layer.
        num_classes: the command line tools fill it in from the data set's class names.
        in_channels: width of the vector; ``TaskModel`` fills in what its neck gives.
        form: ``'mlp'`` two hidden layers with batch norm (Point-MAE), ``'mlp_nobn'`` one without (Point-BERT),
            ``'linear'``. Layers are numbered as in the published heads.
        label_smoothing: torch's: ε is spread over all classes. (Point-BERT spreads it over the wrong ones; its 0.2 is
            ``0.2 * num_classes / (num_classes - 1)`` here.)
        hidden: width of the hidden layers.

    Shape:
        - feats ``(B, in_channels)``; logits ``(B, num_classes)``.

    Raises:
        ValueError, TypeError: ``num_classes`` or ``in_channels`` missing, a number out of range, an unknown form,
            labels outside the classes.
    """

    def __init__(self, num_classes: int | None = None, in_channels: int | None = None, form: str = 'mlp',
                 label_smoothing: float = 0., dropout: float = 0.5, hidden: int = 256):
        super().__init__()
        if num_classes is None:
            raise ValueError('ClsHead: num_classes is not set. tools/train.py fills it in from the class names of the '
                             'training set; otherwise set model.head.num_classes, or ewa3d.build(..., num_classes=...)')
        if in_channels is None:
            raise ValueError('ClsHead: in_channels is not set (TaskModel fills it in from its neck)')
        for name, value in (('num_classes', num_classes), ('in_channels', in_channels), ('hidden', hidden)):
            check_integer(f'ClsHead: {name}', value, 1)
        for name, value in (('label_smoothing', label_smoothing), ('dropout', dropout)):
            check_number(f'ClsHead: {name}', value, '[0, 1]')
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.label_smoothing = label_smoothing
        self.layers = nn.Sequential(*_head_layers(form, in_channels, hidden, num_classes, dropout))
        self.apply(init_vit)

    def forward(self, feats: Tensor) -> Tensor:
        if feats.ndim != 2 or feats.shape[1] != self.in_channels:
            raise ValueError(f'ClsHead: features (B, {self.in_channels}) expected, got {tuple(feats.shape)}; '
                             'tokens are pooled by a neck, dict(type=\'TokenPool\')')
        return self.layers(feats)

    def loss(self, feats: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """``loss_cls`` and, as a statistic, the batch's accuracy ``acc`` in percent.

        Samples with ``gt_scores``, a distribution over the classes, are compared with that (images that were mixed).
        """
        soft = bool(samples) and 'gt_scores' in samples[0]
        target = torch.stack([sample.gt_scores for sample in samples]) if soft else self._labels(samples)
        target = target.to(feats.device, non_blocking=True)
        logits = self(feats).float()
        accuracy = (logits.detach().argmax(1) == (target.argmax(1) if soft else target)).float().mean() * 100
        return {'loss_cls': F.cross_entropy(logits, target, label_smoothing=self.label_smoothing), 'acc': accuracy}

    def predict(self, feats: Tensor, samples: Sequence[Sample] | None = None) -> list[Sample]:
        """The samples with ``pred_scores`` (probabilities) and ``pred_label``, on the CPU."""
        scores = self(feats).float().softmax(-1).cpu()
        labels = scores.argmax(-1)
        samples = [Sample() for _ in scores] if samples is None else list(samples)
        for sample, score, label in zip(samples, scores, labels):
            sample.pred_scores, sample.pred_label = score, label
        return samples

    def _labels(self, samples: Sequence[Sample]) -> Tensor:
        for sample in samples:
            if 'gt_label' not in sample:
                raise ValueError(f'sample {_name(sample)} has no gt_label')
        labels = torch.stack([torch.as_tensor(sample.gt_label).reshape(()) for sample in samples]).long()
        if labels.device.type == 'cpu':
            for i in ((labels < 0) | (labels >= self.num_classes)).nonzero().flatten().tolist():
                raise ValueError(f'sample {_name(samples[i])} has the label {labels[i].item()}; the head has '
                                 f'{self.num_classes} classes, 0 to {self.num_classes - 1}')
        return labels


def _head_layers(form: str, in_channels: int, hidden: int, num_classes: int, dropout: float) -> list[nn.Module]:
    def stage(width: int) -> list[nn.Module]:
        return [nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)]

    if form == 'mlp':
        return [*stage(in_channels), *stage(hidden), nn.Linear(hidden, num_classes)]
    if form == 'mlp_nobn':
        linear, _, relu, drop = stage(in_channels)
        return [linear, relu, drop, nn.Linear(hidden, num_classes)]
    if form == 'linear':
        return [nn.Linear(in_channels, num_classes)]
    raise ValueError(f"ClsHead: form must be 'mlp', 'mlp_nobn' or 'linear', got {form!r}")


def _name(sample: Sample) -> str:
    return repr(sample.get('name', sample.get('index', '(unnamed)')))
