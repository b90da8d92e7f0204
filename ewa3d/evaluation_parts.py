"""Metrics of part segmentation: streaming counts, never lists of points; and voting on parts."""
from collections.abc import Iterator, Mapping, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ewa3d.evaluation_pretrain import SummedMetric
from ewa3d.ops import interpolate
from ewa3d.registry import METRICS
from ewa3d.structures import Sample

__all__ = ['PartIoU', 'predicted_parts', 'propagated_scores', 'shape_iou', 'vote_parts']


@METRICS.register_module()
class PartIoU(SummedMetric):
    """Part segmentation in percent, on the points that the model was given and, with the suffix ``_all``, on all
    points of the original clouds, where the pipeline kept them (transform ``KeepAll``).

    * ``point_acc``: the share of points that are right; ``class_acc``: the mean over parts of the share of each part's
      points that are right.
    * ``instance_mIoU``: the mean over shapes of a shape's IoU, which is the mean over the parts of its category; a part
      that is neither there nor predicted counts as 1. ``category_mIoU``: the mean over categories of the mean over
      their shapes, ``IoU/<category>``.

    Predictions are restricted to the parts of the shape's category. Means are over the parts and categories that
    occur; the log says where some do not (published code gives NaN there).

    Each sample has ``part_scores`` ``(N, num_parts)``, ``gt_parts`` ``(N,)`` and, where the category does not follow
    from those, ``gt_label``; all points are ``all_points`` ``(M, 3)`` and ``gt_all_parts`` ``(M,)``, and ``rows``
    ``(N,)`` says which of them the input was: they are given the scores of the three nearest of these, by inverse
    distance, unless the sample has ``all_part_scores`` ``(M, num_parts)``.

    Args:
        parts: the part numbers of each category; by default the data set's ``metainfo['parts']``.
        prefix: put before the names of the metrics.

    Raises:
        KeyError, ValueError: no parts to know, a sample that lacks something, labels outside of the category's parts,
            scores that are not finite or of another number of points, nothing to evaluate, or more samples than the
            data set has.
    """

    def __init__(self, parts: Mapping[str, Sequence[int]] | None = None, prefix: str | None = None):
        super().__init__(prefix)
        self._parts = parts

    @property
    def parts(self) -> dict[str, list[int]]:
        """Category name → part numbers, in the order of the labels."""
        parts = self._parts or (self.dataset_meta or {}).get('parts')
        if not parts:
            raise KeyError("PartIoU: the data set's metainfo has no 'parts' (category → part numbers); give them as "
                           'parts={…}')
        return {name: list(ids) for name, ids in parts.items()}

    @property
    def num_parts(self) -> int:
        """How many parts there are in all categories."""
        return 1 + max(max(ids) for ids in self.parts.values())

    def size(self) -> int:
        return 2 * 2 * (len(self.parts) + self.num_parts)

    def process(self, data_batch: Mapping, data_samples: Sequence[Mapping]) -> None:
        """Count one batch."""
        for sample in data_samples:
            self.add(torch.cat([self._sampled(sample), self._all(sample)]))

    def compute_metrics(self, results: tuple[Tensor, int]) -> dict[str, float]:
        """The metrics from sums of :meth:`counts_of`, for the given points and for all."""
        given, original = results[0].chunk(2)
        metrics = self._metrics(given, '')
        return metrics | self._metrics(original, '_all') if bool(original.any()) else metrics

    def counts_of(self, predicted: Tensor, truth: Tensor, label: int) -> Tensor:
        """What one shape adds: by category its IoU and 1, by part the points that are right and all of them."""
        ids = list(self.parts.values())[label]
        category = torch.zeros(2, len(self.parts), dtype=torch.float64)
        category[0, label], category[1, label] = shape_iou(predicted, truth, ids), 1.
        points = torch.stack([torch.bincount(truth[predicted == truth], minlength=self.num_parts),
                              torch.bincount(truth, minlength=self.num_parts)])
        return torch.cat([category.flatten(), points.flatten().double()])

    def category_of(self, sample: Mapping) -> int:
        """The category of a sample: its label, or that which has the part of the first point."""
        if 'gt_label' in sample:
            label = int(sample['gt_label'])
            if not 0 <= label < len(self.parts):
                raise ValueError(f'PartIoU: sample {_name(sample)} has the category {label}; there are '
                                 f'{len(self.parts)}')
            return label
        first = int(self.field(sample, 'gt_parts')[0])
        for label, ids in enumerate(self.parts.values()):
            if first in ids:
                return label
        raise ValueError(f'PartIoU: sample {_name(sample)} has the part {first}, which no category has')

    def _truth(self, sample: Mapping, key: str, num_points: int) -> tuple[Tensor, int]:
        """The part of each point, checked, and the category."""
        truth, label = self.field(sample, key).cpu().long(), self.category_of(sample)
        if truth.shape != (num_points,):
            raise ValueError(f'PartIoU: sample {_name(sample)} has {num_points} points and {key} of the shape '
                             f'{tuple(truth.shape)}')
        name, ids = list(self.parts.items())[label]
        wrong = truth[~torch.isin(truth, torch.tensor(ids))]
        if len(wrong):
            raise ValueError(f'PartIoU: sample {_name(sample)} is of the category {name!r} with the parts {ids}, and '
                             f'{key} has {int(wrong[0])}')
        return truth, label

    def _scores(self, sample: Mapping, key: str = 'part_scores') -> Tensor:
        scores = self.field(sample, key).cpu()
        if scores.ndim != 2 or scores.shape[1] < self.num_parts:
            raise ValueError(f'PartIoU: sample {_name(sample)}: {key} must be (N, {self.num_parts}), got '
                             f'{tuple(scores.shape)}')
        if not bool(scores.isfinite().all()):
            raise ValueError(f'PartIoU: the scores of sample {_name(sample)} are not finite; the model has diverged or '
                             'its input is bad')
        return scores

    def _sampled(self, sample: Mapping) -> Tensor:
        scores = self._scores(sample)
        truth, label = self._truth(sample, 'gt_parts', len(scores))
        return self.counts_of(predicted_parts(scores, list(self.parts.values())[label]), truth, label)

    def _all(self, sample: Mapping) -> Tensor:
        if 'all_points' not in sample:
            return torch.zeros(self.size() // 2, dtype=torch.float64)
        points = self.field(sample, 'all_points').cpu()
        truth, label = self._truth(sample, 'gt_all_parts', len(points))
        ids = list(self.parts.values())[label]
        if 'all_part_scores' in sample:
            scores = self._scores(sample, 'all_part_scores')[:, ids]
        else:
            scores = propagated_scores(self._scores(sample)[:, ids], points[self._rows(sample, len(points))], points)
        return self.counts_of(torch.tensor(ids)[scores.argmax(1)], truth, label)

    def _rows(self, sample: Mapping, num_points: int) -> Tensor:
        rows, num_scores = self.field(sample, 'rows').cpu(), len(sample['part_scores'])
        if rows.shape != (num_scores,) or not bool(((rows >= 0) & (rows < num_points)).all()):
            raise ValueError(f'PartIoU: sample {_name(sample)}: rows must be {num_scores} of the {num_points} points, '
                             f'got {tuple(rows.shape)}, up to {int(rows.max()) if rows.numel() else None}')
        return rows

    def _metrics(self, sums: Tensor, suffix: str) -> dict[str, float]:
        names, width = list(self.parts), len(self.parts)
        (iou, shapes), (right, points) = sums[:2 * width].view(2, -1), sums[2 * width:].view(2, -1)
        met, seen = shapes > 0, points > 0
        of_category = iou[met] / shapes[met]
        if not suffix and (len(of_category) < width or int(seen.sum()) < sum(map(len, self.parts.values()))):
            print_log(f'means are over {len(of_category)} of {width} categories and {int(seen.sum())} of '
                      f'{sum(map(len, self.parts.values()))} parts; the others do not occur', logger='current')
        means = dict(instance_mIoU=iou.sum() / shapes.sum(), category_mIoU=of_category.mean(),
                     point_acc=right.sum() / points.sum(), class_acc=(right[seen] / points[seen]).mean())
        metrics = {key + suffix: 100 * float(value) for key, value in means.items()}
        return metrics | {f'IoU{suffix}/{names[i]}': 100 * float(value) for i, value in
                          zip(met.nonzero().flatten().tolist(), of_category)}


def predicted_parts(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """The best of the parts ``ids`` for each point, by ``scores`` ``(N, num_parts)``: ``(N,)`` int64."""
    ids = torch.as_tensor(list(ids), device=scores.device)
    return ids[scores[:, ids].argmax(1)]


def propagated_scores(scores: Tensor, points: Tensor, others: Tensor) -> Tensor:
    """Probabilities of other points of a cloud: those of the three nearest points by inverse distance.

    Shape:
        - scores ``(N, K)`` log-probabilities at points ``(N, 3 + F)``; others ``(M, 3 + F)``; returns ``(M, K)``.
    """
    return interpolate(others[None, :, :3], points[None, :, :3], scores[None].exp())[0]


def shape_iou(predicted: Tensor, truth: Tensor, ids: Sequence[int]) -> float:
    """The mean over the parts ``ids`` of a shape's intersection over union, 1 for a part that is in neither.

    Shape:
        - predicted, truth ``(N,)``, parts of ``ids``.
    """
    ious = []
    for part in ids:
        there, found = truth == part, predicted == part
        union = int((there | found).sum())
        ious.append(int((there & found).sum()) / union if union else 1.)
    return sum(ious) / len(ious)


@torch.no_grad()
def vote_parts(model: nn.Module, loader: DataLoader, voting: Dataset, times: int) -> Iterator[list[Sample]]:
    """The batches of ``loader``, their ``part_scores`` and ``all_part_scores`` being probabilities averaged over
    ``times`` passes.

    A pass draws points of each cloud and changes them as the pipeline of ``voting``, the same data set, says; its
    probabilities are carried from there to all points of the cloud. Both pipelines have a ``KeepAll``. The model should
    be in eval mode; pass ``i`` is epoch ``i`` of ``voting``.

    Raises:
        TypeError: a data set without epochs, of which every pass would be the same.
        ValueError: a pipeline without ``KeepAll``.
    """
    if not hasattr(voting, 'set_epoch'):
        raise TypeError(f'{type(voting).__name__} has no set_epoch: every pass of a vote would be the same')
    for places, batch in zip(loader.batch_sampler, loader):
        samples, totals = batch['data_samples'], [0.] * len(places)
        for epoch in range(times):
            voting.set_epoch(epoch)
            drawn = model.data_preprocessor(loader.collate_fn([voting[place] for place in places]), False)
            scores = model(drawn['inputs'], mode='tensor').cpu()
            for i, (sample, part) in enumerate(zip(samples, drawn['data_samples'])):
                for found, where in ((sample, 'test'), (part, 'vote')):
                    if 'rows' not in found:
                        raise ValueError(f'{_name(sample)}: voting on parts needs dict(type=\'KeepAll\') before '
                                         f'Resample in the {where} pipeline')
                points = sample.all_points
                totals[i] = totals[i] + propagated_scores(scores[i], points[part.rows.cpu()], points)
        for sample, total in zip(samples, totals):
            sample.all_part_scores = total / times
            sample.part_scores = sample.all_part_scores[sample.rows]
        yield samples


def _name(sample: Mapping) -> str:
    return repr(sample.get('name', sample.get('index', '?')))
