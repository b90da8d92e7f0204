"""The head of a query detector: five MLPs, and 3DETR's set loss."""
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.models.detection.coder import BoxCoder, extent
from ewa3d.models.detection.decoder import QueryFeatures, in_range, pointwise_mlp
from ewa3d.models.detection.matcher import match
from ewa3d.ops import box3d_giou, official_giou
from ewa3d.registry import MODELS, nearest
from ewa3d.structures import Sample

__all__ = ['COSTS', 'LOSS_WEIGHTS', 'DETRHead']

# 3DETR's on ScanNet; on SUN RGB-D: costs giou=3, center=5, objectness=5, weights giou=0 and no_object=0.1.
COSTS = dict(giou=2., sem_cls=1., center=0., objectness=0.)
LOSS_WEIGHTS = dict(sem_cls=1., no_object=0.25, center=5., size=1., giou=1., angle_cls=0.1, angle_reg=0.5)
GIOU = ('exact', 'official')


@MODELS.register_module()
class DETRHead(nn.Module):
    """3DETR's head (Misra et al. 2021): class, centre, size and heading of every query, by MLPs that all layers of the
    decoder share; each layer is matched with the objects and scored by itself.

    Args:
        num_classes: the command line tools fill it in from the data set's class names. One more output is "no object".
        in_channels: width of the queries; ``TaskModel`` fills in what its neck gives.
        num_angle_bins: of the heading; 1 means boxes along the axes (see
            :class:`~ewa3d.models.detection.coder.BoxCoder`).
        dropout: in the MLPs.
        costs: of a match, changes to ``COSTS``: minus the GIoU and the probabilities of the class and of an object, and
            the L1 distance of the centres in a cloud that measures 1.
        loss_weights: changes to ``LOSS_WEIGHTS``; ``no_object`` is the weight of that class in the cross-entropy. A
            term with weight 0 is left out.
        giou: ``'exact'``, or ``'official'``: that of the published training code, which is wrong for most rotated pairs
            (see :func:`ewa3d.ops.official_giou`) and treats a batch whose headings are all at most 0 as axis-aligned.

    Shape:
        - feats :class:`~ewa3d.models.detection.decoder.QueryFeatures`. ``forward`` returns a dict of the last layer's
          ``sem_cls_logits`` ``(B, Q, K + 1)``, ``center`` and ``size`` ``(B, Q, 3)`` in metres, ``angle`` ``(B, Q)``,
          the official heading, which is minus the yaw, and what they are made of; ``aux`` lists the other layers'.
        - samples have ``gt_boxes`` ``(M, 7)`` with yaw and ``gt_labels`` ``(M,)``; ``M`` may be 0.

    Raises:
        TypeError, ValueError: numbers missing or out of range, unknown names; boxes or labels that are missing, of
            another shape, not finite, without a size, outside of the classes, more than there are queries.
    """

    def __init__(self, num_classes: int | None = None, in_channels: int | None = None, num_angle_bins: int = 1,
                 dropout: float = 0.3, costs: Mapping[str, float] | None = None,
                 loss_weights: Mapping[str, float] | None = None, giou: str = 'exact'):
        super().__init__()
        if num_classes is None:
            raise ValueError('DETRHead: num_classes is not set. tools/train.py fills it in from the class names of the '
                             'training set; otherwise set model.head.num_classes')
        if in_channels is None:
            raise ValueError('DETRHead: in_channels is not set (TaskModel fills it in from its neck)')
        for name, value in (('num_classes', num_classes), ('in_channels', in_channels)):
            check_integer(f'DETRHead: {name}', value, 1)
        check_number('DETRHead: dropout', dropout, '[0, 1]')
        if giou not in GIOU:
            raise ValueError(f'DETRHead: giou={giou!r}; {nearest(giou, GIOU)}')
        self.num_classes, self.giou = num_classes, giou
        self.coder = BoxCoder(num_angle_bins)
        self.costs = _numbers('costs', COSTS, costs)
        self.loss_weights = _numbers('loss_weights', LOSS_WEIGHTS, loss_weights)
        if self.loss_weights['no_object'] == 0:
            raise ValueError('DETRHead: loss_weights.no_object must be above 0: a cloud without objects has no other '
                             'class')
        outputs = dict(sem_cls=num_classes + 1, center=3, size=3, angle_cls=num_angle_bins,
                       angle_residual=num_angle_bins)
        for name, width in outputs.items():
            setattr(self, f'{name}_head', pointwise_mlp((in_channels, in_channels, in_channels, width), dropout))
        self.outputs = tuple(outputs)

    # ---- predictions -------------------------------------------------------------------------------------------------
    def forward(self, feats: QueryFeatures) -> dict:
        stacked = self.predictions(feats)
        *others, last = [{name: value[i] for name, value in stacked.items()} for i in range(len(feats.x))]
        return {**last, 'aux': others}

    def predictions(self, feats: QueryFeatures) -> dict[str, Tensor]:
        """Those of all layers of the decoder, ``(D, B, Q, ...)``."""
        D, B, Q, C = feats.x.shape
        rows = feats.x.reshape(-1, C)
        raw = {name: getattr(self, f'{name}_head')(rows).view(D, B, Q, -1) for name in self.outputs}
        raw = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in raw.items()}
        return self.coder.decode(raw, feats.coord, feats.low, feats.high)

    def predict(self, feats: QueryFeatures, samples: Sequence[Sample] | None = None) -> list[Sample]:
        """The samples with ``pred_boxes`` ``(Q, 7)``, ``pred_scores`` ``(Q, num_classes)``, the probabilities of the
        classes, and ``pred_objectness`` ``(Q,)``, that of any of them, on the CPU. Nothing is suppressed."""
        last = self.predictions(feats._replace(x=feats.x[-1:]))
        last = {name: value[0] for name, value in last.items()}
        probabilities = last['sem_cls_logits'].softmax(-1).cpu()
        boxes = self.coder.boxes(last).cpu()
        samples = [Sample() for _ in boxes] if samples is None else list(samples)
        for sample, box, probability in zip(samples, boxes, probabilities):
            sample.pred_boxes, sample.pred_scores = box, probability[:, :-1]
            sample.pred_objectness = 1 - probability[:, -1]
        return samples

    # ---- loss --------------------------------------------------------------------------------------------------------
    def loss(self, feats: QueryFeatures, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """``loss_sem_cls``, ``loss_center``, ``loss_size``, ``loss_angle_cls``, ``loss_angle_reg`` and ``loss_giou`` of
        the last layer, weighted; those of layer ``k`` end in ``_k``. As a statistic, ``cardinality_error``: by how many
        the objects found differ from those there are, in the last layer."""
        boxes, labels, counts = self.targets(samples, feats.x.shape[2], feats.coord)
        predicted = self.predictions(feats)
        clouds, queries, objects = self.match(predicted, boxes, labels, counts, feats)
        terms = self._terms(predicted, boxes, labels, counts, feats, (clouds, queries, objects))
        last = len(feats.x) - 1
        losses = {f'loss_{name}' + (f'_{k}' if k < last else ''): value[k] for k in (last, *range(last))
                  for name, value in terms.items()}
        found = (predicted['sem_cls_logits'][-1].detach().argmax(-1) < self.num_classes).sum(-1)
        losses['cardinality_error'] = (found - torch.tensor(counts, device=found.device)).abs().float().mean()
        return losses

    def targets(self, samples: Sequence[Sample], num_queries: int, like: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """Boxes ``(B, M, 7)`` and labels ``(B, M)`` of all clouds, padded with unit boxes, and how many each has."""
        found = [self._checked(sample, num_queries) for sample in samples]
        counts = [len(labels) for _, labels in found]
        padding = torch.tensor([0., 0., 0., 1., 1., 1., 0.])
        boxes = padding.repeat(len(found), max(counts), 1)
        labels = torch.zeros(boxes.shape[:2], dtype=torch.int64)
        for i, (box, label) in enumerate(found):
            boxes[i, :len(box)], labels[i, :len(label)] = box, label
        return boxes.to(like.device, like.dtype), labels.to(like.device), counts

    def _checked(self, sample: Sample, num_queries: int) -> tuple[Tensor, Tensor]:
        if 'gt_boxes' not in sample or 'gt_labels' not in sample:
            raise ValueError(f'sample {_name(sample)} has no gt_boxes and gt_labels')
        boxes, labels = (torch.as_tensor(value).detach().cpu() for value in (sample.gt_boxes, sample.gt_labels))
        if boxes.ndim != 2 or boxes.shape[1] != 7 or labels.shape != boxes.shape[:1]:
            raise ValueError(f'sample {_name(sample)}: gt_boxes (M, 7) and gt_labels (M,) expected, got '
                             f'{tuple(boxes.shape)} and {tuple(labels.shape)}')
        bad = ~boxes.isfinite().all(1) | (boxes[:, 3:6] <= 0).any(1)
        if bad.any():
            i = int(bad.nonzero()[0])
            raise ValueError(f'sample {_name(sample)}: box {i} must have finite values and sizes above 0, got '
                             f'{[round(value, 4) for value in boxes[i].tolist()]}')
        wrong = (labels < 0) | (labels >= self.num_classes)
        if wrong.any():
            raise ValueError(f'sample {_name(sample)} has the label {int(labels[wrong][0])}; the head has '
                             f'{self.num_classes} classes, 0 to {self.num_classes - 1}')
        if len(boxes) > num_queries:
            raise ValueError(f'sample {_name(sample)} has {len(boxes)} boxes, the model {num_queries} queries, and a '
                             'query finds one box; give model.neck.num_queries more')
        return boxes.float(), labels.long()

    @torch.no_grad()
    def match(self, predicted: dict[str, Tensor], boxes: Tensor, labels: Tensor, counts: Sequence[int],
              feats: QueryFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of all layers: see :func:`ewa3d.models.detection.matcher.match`."""
        probabilities = predicted['sem_cls_logits'].softmax(-1)
        D, B, Q, _ = probabilities.shape
        chosen = labels[None, :, None].expand(D, B, Q, -1)
        cost = -self.costs['sem_cls'] * probabilities.gather(-1, chosen)
        cost = cost - self.costs['objectness'] * (1 - probabilities[..., -1:])
        if self.costs['center']:
            centers = in_range(boxes[..., :3], feats.low, feats.high).expand(D, -1, -1, -1)
            cost = cost + self.costs['center'] * torch.cdist(predicted['center_normalized'], centers, p=1)
        if self.costs['giou'] and boxes.shape[1]:
            giou = self._giou(self.coder.boxes(predicted), boxes.expand(D, -1, -1, -1), boxes)
            cost = cost - self.costs['giou'] * giou
        return match(cost, counts)

    def _giou(self, a: Tensor, b: Tensor, truth: Tensor) -> Tensor:
        if self.giou == 'official':  # padding has the heading 0
            return official_giou(a, b, rotated=bool((truth[..., 6] < 0).any()))
        return box3d_giou(a, b)

    def _terms(self, predicted: dict[str, Tensor], boxes: Tensor, labels: Tensor, counts: Sequence[int],
               feats: QueryFeatures, pairs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        """The weighted losses of each layer ``(D,)``, but for those with weight 0."""
        clouds, queries, objects = pairs
        D, B = feats.x.shape[:2]
        layers, scenes = clouds // B, clouds % B
        box, label = boxes[scenes, objects], labels[scenes, objects]  # (P, 7), (P,)
        of_match = {name: value.flatten(0, 1)[clouds, queries] for name, value in predicted.items()}  # (P, ...)
        low, high, weights = feats.low[scenes], feats.high[scenes], self.loss_weights
        total = torch.tensor(float(sum(counts)), device=box.device)
        all_reduce(total, 'mean')  # in place: as many as a process has on average
        total = total.clamp(min=1)

        def per_layer(values: Tensor) -> Tensor:
            return values.new_zeros(D).index_add(0, layers, values) / total

        center = in_range(box[:, None, :3], low, high).squeeze(1)
        bins, residual = self.coder.encode_angle(-box[:, 6])
        guessed = of_match['angle_residual_normalized'].gather(1, bins.unsqueeze(1)).squeeze(1)
        terms = dict(
            sem_cls=lambda: self._classification(predicted['sem_cls_logits'], clouds, queries, label),
            center=lambda: per_layer((of_match['center_normalized'] - center).abs().sum(-1)),
            size=lambda: per_layer((of_match['size_normalized'] - box[:, 3:6] / extent(low, high)).abs().sum(-1)),
            angle_cls=lambda: per_layer(F.cross_entropy(of_match['angle_logits'], bins, reduction='none')),
            angle_reg=lambda: per_layer(F.huber_loss(guessed, residual / (self.coder.bin / 2), reduction='none')),
            giou=lambda: per_layer(1 - self._giou(self.coder.boxes(of_match).unsqueeze(1), box.unsqueeze(1),
                                                  boxes).flatten()))
        return {name: weights[name] * term() for name, term in terms.items() if weights[name]}

    def _classification(self, logits: Tensor, clouds: Tensor, queries: Tensor, label: Tensor) -> Tensor:
        """Cross-entropy over the classes and "no object", a mean weighted by class, of each layer ``(D,)``."""
        target = torch.full(logits.shape[:-1], self.num_classes, device=logits.device)
        target.flatten(0, 1)[clouds, queries] = label
        weight = logits.new_ones(self.num_classes + 1)
        weight[-1] = self.loss_weights['no_object']
        loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight, reduction='none')
        return loss.view(len(logits), -1).sum(1) / weight[target].flatten(1).sum(1)


def _numbers(name: str, defaults: Mapping[str, float], given: Mapping[str, float] | None) -> dict[str, float]:
    """``defaults`` with what is given in place; all at least 0."""
    for key, value in (given or {}).items():
        if key not in defaults:
            raise TypeError(f'DETRHead: {name} has no {key!r}; {nearest(key, defaults)}')
        check_number(f'DETRHead: {name}.{key}', value, '[0, inf)')
    return {**defaults, **(given or {})}


def _name(sample: Sample) -> str:
    return repr(sample.get('name', sample.get('index', '(unnamed)')))
