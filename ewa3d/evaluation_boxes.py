"""Average precision of boxes, as VoteNet and 3DETR report it; scores and hits are kept, never clouds."""
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric
from torch import Tensor

from ewa3d.checks import check_integer, check_number
from ewa3d.ops.boxes import box3d_iou, nms3d, points_in_boxes
from ewa3d.registry import METRICS, nearest

__all__ = ['BoxAP', 'average_precision', 'kept_boxes', 'match_boxes']

NMS = ('class', 'all', 'bev', 'none')
SCORES = ('per_class', 'objectness', 'class')


@METRICS.register_module()
class BoxAP(BaseMetric):
    """Average precision and recall of boxes in percent, under two conventions:

    * ``AP25 AP50 AR25 AR50``: as VoteNet and 3DETR report it, the mean over the classes that occur in the ground truth
      or in the kept predictions; a class that is only predicted counts as 0. With ``score='per_class'`` every class is
      predicted, so that classes that the data do not have lower it.
    * ``AP25_gt`` and so on: the mean over the classes that have ground truth.

    ``AP25/<class>`` and ``AR25/<class>`` are those of one class with ground truth. Recall is that of all kept boxes.

    Boxes with fewer than ``min_points`` points inside go, where all would go the one of the highest objectness stays;
    then suppression; then boxes of an objectness up to ``threshold`` go. In each scene and class the best box whose
    highest IoU with the ground truth exceeds the limit is a hit, one for each true box; precision is integrated over
    all its steps, after making it monotonic.

    Each sample has ``pred_boxes`` ``(Q, 7)``, ``pred_scores`` ``(Q, K)`` (probabilities of the classes),
    ``pred_objectness`` ``(Q,)``, ``gt_boxes`` ``(M, 7)`` and ``gt_labels`` ``(M,)``; ``min_points`` asks for the
    points that the model was given: the inputs of the batch.

    Args:
        iou: the limits; the names of the metrics hold them in percent.
        min_points: 0 keeps empty boxes.
        nms: on axis-aligned hulls, by objectness: ``'class'`` within the most probable class, ``'all'``, ``'bev'``
            seen from above without regard to classes, or ``'none'``.
        nms_iou: boxes that overlap a better one by more go.
        nms_over: ``'union'``, or ``'worse'``: the overlap is divided by the size of the worse box.
        threshold: of objectness.
        score: ``'per_class'``: a box counts once for every class, with its probability times the objectness.
            Otherwise once, for its most probable class, with the ``'objectness'`` or the probability of that
            ``'class'``.
        prefix: put before the names of the metrics.

    Raises:
        KeyError, ValueError: a sample that lacks something or holds other shapes, values that are not finite, labels
            outside of the classes, nothing to evaluate, or more samples than the data set has.
    """
    default_prefix = ''

    def __init__(self, iou: Sequence[float] = (0.25, 0.5), min_points: int = 5, nms: str = 'class',
                 nms_iou: float = 0.25, nms_over: str = 'union', threshold: float = 0.05, score: str = 'per_class',
                 prefix: str | None = None):
        super().__init__(collect_device='cpu', prefix=prefix)
        self.iou = [check_number('BoxAP: iou', value, '[0, 1)') for value in iou]
        for name, value, valid in (('nms', nms, NMS), ('score', score, SCORES),
                                   ('nms_over', nms_over, ('union', 'worse'))):
            if value not in valid:
                raise ValueError(f'BoxAP: {name}={value!r}; {nearest(value, valid)}')
        self.rules = dict(min_points=check_integer('BoxAP: min_points', min_points, 0), nms=nms, nms_over=nms_over,
                          nms_iou=check_number('BoxAP: nms_iou', nms_iou))
        self.threshold, self.score = check_number('BoxAP: threshold', threshold), score

    @staticmethod
    def metric_names(classes: Sequence[str] = (), prefix: str | None = None,
                     iou: Sequence[float] = (0.25, 0.5)) -> list[str]:
        """What the metrics are called, for data with these classes."""
        names = [f'{kind}{round(100 * limit)}{tail}' for limit in iou for tail in ('', '_gt', *(
            f'/{name}' for name in classes)) for kind in ('AP', 'AR')]
        return [f'{prefix}/{name}' for name in names] if prefix else names

    def process(self, data_batch: Mapping, data_samples: Sequence[Mapping]) -> None:
        """Count one batch."""
        clouds = ((data_batch or {}).get('inputs') or {}).get('points')
        if clouds is None and self.rules['min_points']:
            raise KeyError("BoxAP: the batch has no inputs['points'] to look for points in boxes; min_points=0 does "
                           'without')
        for i, sample in enumerate(data_samples):
            self.results.append(self.count(sample, None if clouds is None else clouds[i]))

    def count(self, sample: Mapping, points: Tensor | None) -> dict[str, np.ndarray]:
        """What one scene adds: of each kept box and class the score and, by limit, whether it is a hit (``-1`` as a
        score: the box does not count for the class); and the true boxes by class.

        Shape:
            - ``scores`` ``(Q', K)``, ``hits`` ``(limits, Q', K)``, ``truth`` ``(K,)``.
        """
        boxes, scores, objectness, gt_boxes, gt_labels = self._read(sample)
        best = scores.argmax(-1)
        kept = kept_boxes(boxes, objectness, best, points, **self.rules)
        kept = kept[objectness[kept] > self.threshold]
        boxes, objectness, best, scores = boxes[kept], objectness[kept], best[kept], scores[kept]
        if self.score == 'per_class':
            confidence = scores * objectness[:, None]
        else:
            chosen = objectness if self.score == 'objectness' else scores.gather(1, best[:, None])[:, 0]
            confidence = torch.full_like(scores, -1).scatter(1, best[:, None], chosen[:, None])
        confidence = confidence.numpy()
        iou = box3d_iou(boxes.double(), gt_boxes.double()).numpy()
        hits = np.zeros((len(self.iou), *confidence.shape), bool)
        for label in gt_labels.unique().tolist():
            counted = confidence[:, label] >= 0
            found = iou[counted][:, gt_labels.numpy() == label]
            for i, limit in enumerate(self.iou):
                hits[i, counted, label] = match_boxes(found, confidence[counted, label], limit)
        return dict(scores=confidence, hits=hits, truth=np.bincount(gt_labels.numpy(), minlength=scores.shape[1]))

    def evaluate(self, size: int) -> dict[str, float]:
        """Collect from all ranks, compute, and start again.

        Args:
            size: number of samples in the data set.
        """
        count = torch.tensor(len(self.results))
        all_reduce(count, 'sum')
        if not 0 < int(count) <= size:
            raise ValueError(f'BoxAP: {int(count)} samples were evaluated and the data set has {size}; a sampler must '
                             "give each once: dict(type='DefaultSampler', shuffle=False, round_up=False)")
        return super().evaluate(size)

    def compute_metrics(self, results: Sequence[Mapping]) -> dict[str, float]:
        """The metrics from what :meth:`count` returned of all scenes."""
        scores = np.concatenate([scene['scores'] for scene in results])
        hits = np.concatenate([scene['hits'] for scene in results], axis=1)
        truth = sum(scene['truth'] for scene in results)
        names = list((self.dataset_meta or {}).get('classes') or map(str, range(len(truth))))
        if len(names) != len(truth):
            raise ValueError(f'BoxAP: the data set has {len(names)} classes, pred_scores {len(truth)}')
        predicted = (scores >= 0).any(0)
        metrics, details = {}, {}
        for limit, found in zip(self.iou, hits):
            pairs = [average_precision(scores[:, k][scores[:, k] >= 0], found[:, k][scores[:, k] >= 0], truth[k])
                     for k in range(len(truth))]
            percent = f'{round(100 * limit)}'
            for kind, values in zip(('AP', 'AR'), 100 * np.array(pairs).T):
                for tail, classes in (('', (truth > 0) | predicted), ('_gt', truth > 0)):
                    metrics[f'{kind}{percent}{tail}'] = float(values[classes].mean()) if classes.any() else 0.
                details.update({f'{kind}{percent}/{names[k]}': float(values[k]) for k in np.flatnonzero(truth)})
        return metrics | details

    def _read(self, sample: Mapping) -> list[Tensor]:
        """Boxes, class scores and objectness, then true boxes and labels, checked and on the CPU."""
        name = sample.get('name', sample.get('index', '?'))
        keys = ('pred_boxes', 'pred_scores', 'pred_objectness', 'gt_boxes', 'gt_labels')
        missing = [key for key in keys if key not in sample]
        if missing:
            raise KeyError(f'BoxAP: sample {name!r} needs {missing[0]!r}, it has {sorted(map(str, sample))}')
        values = [torch.as_tensor(sample[key]).detach().cpu() for key in keys]
        boxes, scores, objectness, gt_boxes, gt_labels = values
        if scores.ndim != 2 or boxes.shape != (len(scores), 7) or objectness.shape != (len(scores),) or \
                gt_labels.ndim != 1 or gt_boxes.shape != (len(gt_labels), 7):
            shapes = ', '.join(f'{key} {tuple(value.shape)}' for key, value in zip(keys, values))
            raise ValueError(f'BoxAP: sample {name!r} should have pred_boxes (Q, 7), pred_scores (Q, K), '
                             f'pred_objectness (Q,), gt_boxes (M, 7) and gt_labels (M,), got {shapes}')
        for key, value in zip(keys, values):
            if not bool(value.isfinite().all()):
                raise ValueError(f'BoxAP: {key} of sample {name!r} is not finite; the model has diverged or its input '
                                 'is bad')
        if bool((scores < 0).any()) or bool((objectness < 0).any()):
            raise ValueError(f'BoxAP: sample {name!r} has negative pred_scores or pred_objectness, which are '
                             'probabilities')
        wrong = gt_labels[(gt_labels < 0) | (gt_labels >= scores.shape[1])]
        if len(wrong):
            raise ValueError(f'BoxAP: sample {name!r} has a box of class {int(wrong[0])}, outside of '
                             f'0 … {scores.shape[1] - 1}')
        return [*(value.float() if not value.is_floating_point() else value for value in values[:4]), gt_labels.long()]


def kept_boxes(boxes: Tensor, objectness: Tensor, labels: Tensor, points: Tensor | None = None, min_points: int = 5,
               nms: str = 'class', nms_iou: float = 0.25, nms_over: str = 'union') -> Tensor:
    """Which boxes of a scene stay after the test for points and suppression (see :class:`BoxAP`), in ascending order.

    Shape:
        - boxes ``(Q, 7)``, objectness and labels ``(Q,)``, points ``(P, 3+F)``; returns indices ``(Q',)``.

    Raises:
        ValueError: ``min_points`` without the points.
    """
    kept = torch.arange(len(boxes))
    if min_points and len(boxes):
        if points is None:
            raise ValueError(f'kept_boxes: min_points={min_points} needs the points of the scene')
        points = torch.as_tensor(points).detach().cpu()[:, :3].to(boxes.dtype)
        kept = kept[points_in_boxes(points, boxes).sum(-1) >= min_points]
        if not len(kept):
            kept = objectness.argmax().view(1)
    if nms != 'none':
        kept = kept[nms3d(boxes[kept], objectness[kept], nms_iou, labels[kept] if nms == 'class' else None, nms_over,
                          'xy' if nms == 'bev' else 'xyz')]
    return kept.sort()[0]


def match_boxes(iou: np.ndarray, scores: np.ndarray, limit: float) -> np.ndarray:
    """Which predictions of one scene and class are hits: the best scored one of those that overlap a true box by more
    than ``limit`` and no other true box more.

    Shape:
        - iou ``(Q, M)``, scores ``(Q,)``; returns bool ``(Q,)``.
    """
    hits = np.zeros(len(scores), bool)
    if iou.size:
        target = np.where(iou.max(1) > limit, iou.argmax(1), -1)
        order = np.argsort(-scores, kind='stable')
        found, first = np.unique(target[order], return_index=True)
        hits[order[first[found >= 0]]] = True
    return hits


def average_precision(scores: np.ndarray, hits: np.ndarray, truth: int) -> tuple[float, float]:
    """The area under the monotonic precision over recall, and the last recall; 0 without true boxes.

    Shape:
        - scores and hits (bool) ``(P,)``, one a prediction.
    """
    if not truth or not len(scores):
        return 0., 0.
    right = np.cumsum(hits[np.argsort(-scores, kind='stable')])
    precision = right / np.arange(1, len(right) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(right, prepend=0)
    return float((envelope * steps).sum() / truth), float(right[-1] / truth)
