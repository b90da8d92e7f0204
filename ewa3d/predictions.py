"""What a model says about one cloud, image or scene, with names."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ewa3d.evaluation_boxes import BoxAP, kept_boxes
from ewa3d.evaluation_parts import propagated_scores
from ewa3d.structures import Sample

__all__ = ['BoxPrediction', 'ClassPrediction', 'PartPrediction', 'Prediction', 'prediction_of']


@dataclass(frozen=True, eq=False)
class ClassPrediction:
    """The class of one input.

    Attributes:
        name: of the input: its path, or its place in what was given.
        label, class_name, score: the most probable class, its name and its probability.
        scores: ``(num_classes,)`` float, the probabilities of all classes.
        classes: their names.
    """
    name: str
    label: int
    class_name: str
    score: float
    scores: Tensor = field(repr=False)
    classes: tuple[str, ...] = field(repr=False)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return dict(name=self.name, label=self.label, class_name=self.class_name, score=self.score,
                    scores=dict(zip(self.classes, self.scores.tolist())))

    def __str__(self) -> str:
        best = self.scores.argsort(descending=True)[:3].tolist()
        return ', '.join(f'{self.classes[i]} {float(self.scores[i]):.3f}' for i in best)


@dataclass(frozen=True, eq=False)
class PartPrediction:
    """The part of every point of one cloud, in the order of the points that were given.

    Attributes:
        name: of the cloud.
        parts: ``(N,)`` int64.
        part_scores: ``(N, num_parts)`` float, probabilities. Points that the model did not see have those of the three
            nearest that it saw, by inverse distance.
        category: the name of the category that the model was told, if it was.
        part_names: of all parts, where the data set names them.
    """
    name: str
    parts: Tensor = field(repr=False)
    part_scores: Tensor = field(repr=False)
    category: str | None = None
    part_names: tuple[str, ...] | None = field(default=None, repr=False)

    def as_dict(self) -> dict:
        """Plain values, for JSON; without the scores, which are many."""
        return dict(name=self.name, category=self.category, parts=self.parts.tolist(),
                    part_names=None if self.part_names is None else list(self.part_names))

    def __str__(self) -> str:
        ids, counts = self.parts.unique(return_counts=True)
        found = ', '.join(f'{self.part_names[i] if self.part_names else f"part {i}"}: {count}'
                          for i, count in zip(ids.tolist(), counts.tolist()))
        return f'{len(self.parts)} points; {found}'


@dataclass(frozen=True, eq=False)
class BoxPrediction:
    """The objects in one scene, the best first.

    Attributes:
        name: of the scene.
        boxes: ``(M, 7)``: centre, full sizes, yaw, as in :mod:`ewa3d.ops.boxes`, where the given points are.
        labels: ``(M,)`` int64; class_names: their names; scores: ``(M,)``, the probability of that class.
    """
    name: str
    boxes: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    class_names: tuple[str, ...]
    scores: Tensor = field(repr=False)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return dict(name=self.name, boxes=[dict(class_name=name, label=label, score=score, box=box) for
                                           name, label, score, box in zip(self.class_names, self.labels.tolist(),
                                                                          self.scores.tolist(), self.boxes.tolist())])

    def __str__(self) -> str:
        found = ', '.join(f'{name} {score:.3f}' for name, score in zip(self.class_names, self.scores.tolist()))
        return f'{len(self.boxes)} boxes' + (f': {found}' if found else '')


Prediction = ClassPrediction | PartPrediction | BoxPrediction


def prediction_of(sample: Sample, entry: Mapping, cloud: Tensor | None, usage, threshold: float | None) -> Prediction:
    """What a head wrote into ``sample``.

    Args:
        entry: what was given: ``name``, ``label`` (the category) and, of an array, ``points``.
        cloud: the model's input ``(N, 3+F)``, where it is a cloud.
        usage: :class:`ewa3d.inference.Usage`.
        threshold: of objectness; ``None``: the evaluation's.

    Raises:
        ValueError: a head that gives neither classes nor parts nor boxes.
    """
    name = entry['name']
    if 'pred_boxes' in sample:
        return _boxes(sample, entry, cloud, usage, threshold)
    if 'part_scores' in sample:
        return _parts(sample, entry, usage)
    if 'pred_scores' in sample:
        scores = sample.pred_scores.cpu()
        names, label = _names(usage, len(scores)), int(sample.pred_label)
        return ClassPrediction(name, label, names[label], float(scores[label]), scores, names)
    raise ValueError(f'predict knows classes, parts and boxes; the head gave {", ".join(sorted(sample.keys()))}')


def _names(usage, count: int) -> tuple[str, ...]:
    """Those of the classes, or their numbers where they are not known."""
    names = tuple(map(str, usage.metainfo.get('classes') or ()))
    return names if len(names) == count else tuple(map(str, range(count)))


def _parts(sample: Sample, entry: Mapping, usage) -> PartPrediction:
    scores, rows = sample.part_scores.float().cpu(), sample.rows.cpu()
    if len(rows) != len(scores):
        raise ValueError(f'{entry["name"]}: the pipeline changes the number of points without saying which are kept')
    points = sample.all_points - sample.all_points.mean(0)  # of the size that inverse distances are meant for
    points = points / points.norm(dim=1).max().clamp(min=torch.finfo(points.dtype).tiny)
    found = propagated_scores(scores, points[rows], points)
    found[rows] = scores.exp()  # what the model saw has its own
    label, parts = entry['label'], usage.metainfo.get('parts') or {}
    if label is not None and label < len(parts):  # those of the category alone, as in the evaluation
        other = torch.ones(scores.shape[1], dtype=torch.bool)
        other[list(list(parts.values())[label])] = False
        found = found.masked_fill(other, 0.)
        found = found / found.sum(-1, keepdim=True).clamp(min=torch.finfo(found.dtype).tiny)
        labels = found.masked_fill(other, -1.).argmax(-1)
    else:
        labels = found.argmax(-1)
    names = usage.metainfo.get('part_names')
    names = tuple(names) if isinstance(names, Sequence) and len(names) == scores.shape[1] else None
    categories = list(usage.metainfo.get('classes') or parts)
    category = categories[label] if label is not None and label < len(categories) else None
    return PartPrediction(entry['name'], labels, found, category, names)


def _boxes(sample: Sample, entry: Mapping, cloud: Tensor, usage, threshold: float | None) -> BoxPrediction:
    rules = BoxAP(**usage.boxes)
    boxes, scores, objectness = (sample.get(key).float().cpu() for key in ('pred_boxes', 'pred_scores',
                                                                           'pred_objectness'))
    best, label = scores.max(-1)
    kept = kept_boxes(boxes, objectness, label, cloud, **rules.rules)
    kept = kept[objectness[kept] > (rules.threshold if threshold is None else threshold)]
    kept = kept[best[kept].argsort(descending=True, stable=True)]
    names = _names(usage, scores.shape[1])
    return BoxPrediction(entry['name'], _where_given(boxes[kept], entry, sample), label[kept],
                         tuple(names[i] for i in label[kept].tolist()), best[kept])


def _where_given(boxes: Tensor, entry: Mapping, sample: Sample) -> Tensor:
    """Boxes back where an array of map coordinates is: single precision made the reader move it to the origin."""
    points = entry.get('points')
    if points is None or points.dtype != np.float64:
        return boxes
    offset = torch.from_numpy(points[0, :3] - sample.all_points[0].double().numpy())
    if float(offset.abs().max()) <= 1e-3 * float(np.abs(points[:, :3]).max()):
        return boxes
    return torch.cat([boxes[:, :3] + offset, boxes[:, 3:].double()], 1)
