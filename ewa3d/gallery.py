"""Samples of a data set as pictures: clouds, parts, boxes, images, clips; alone or with what a model predicts of them.
"""
import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ewa3d.charts import page
from ewa3d.files import atomic_write
from ewa3d.predictions import BoxPrediction, PartPrediction, Prediction
from ewa3d.viewer import write_html
from ewa3d.visualization import (
    PALETTE,
    PLAIN,
    RIGHT,
    WRONG,
    draw_clouds,
    draw_images,
    draw_reconstructions,
    palette,
    part_cells,
    write_ply,
)
from ewa3d.visualization_boxes import box_cells

__all__ = ['by_source', 'sample_cells', 'write_gallery', 'write_predictions']

OBJECTNESS = 0.5  # of the predicted boxes that are drawn


def write_gallery(items: Sequence[Mapping], dataset, stem: str | Path, heading: str = '', predicted: bool = False,
                  ply: bool = False) -> list[Path]:
    """``stem.png``, and ``stem.html`` to turn clouds or to look closely, of samples of one data set.

    Args:
        items: what the data set gives, ``{'inputs': …, 'data_samples': …}``. dataset: for its metainfo and the
            normalisation of its images, which is undone.
        predicted: the samples have predictions, which are drawn with the truth.
        ply: write each cloud to ``stem_<number>.ply`` as well.

    Raises:
        KeyError: inputs that are neither points nor images nor clips.
    """
    stem, metainfo = Path(stem), getattr(dataset, 'metainfo', None) or {}
    png, up = stem.with_name(f'{stem.name}.png'), metainfo.get('up_axis') or 'z'
    samples = [item['data_samples'] for item in items]
    if predicted and 'pred_points' in samples[0]:
        masked = 'visible_points' in samples[0]
        made = [s.reconstructed_points if masked else s.pred_points for s in samples]
        return [draw_reconstructions([item['inputs']['points'] for item in items], made, png, up=up, heading=heading,
                                     visible=[s.visible_points for s in samples] if masked else None,
                                     titles=[_name(s) for s in samples])]
    return _write(sample_cells(items, dataset, predicted), stem, up, heading, ply)


def write_predictions(found: Sequence[Prediction], inputs: Sequence, stem: str | Path, up: str = 'z', heading: str = '',
                      ply: bool = False) -> list[Path]:
    """``stem.png`` and ``stem.html`` of what a model says about clouds or images: classes below them, points in the
    colours of their parts, boxes.

    Args:
        found: of ``model.predict``, one each. inputs: what it was given, ``(N, 3 + F)`` or images ``(H, W, C)`` bytes;
            :func:`ewa3d.inference.originals` reads files.
        up: the vertical axis of the clouds. ply: write each cloud to ``stem_<number>.ply`` as well.

    Raises:
        ValueError: nothing, another number of inputs than predictions, or arrays that are neither.
    """
    if len(found) != len(inputs) or not found:
        raise ValueError(f'{len(found)} predictions and {len(inputs)} inputs; as many of each were expected')
    names, legend = [Path(one.name).name for one in found], {}
    if isinstance(found[0], BoxPrediction):
        classes = {label: name for one in found for label, name in zip(one.labels.tolist(), one.class_names)}
        return _write(box_cells(inputs, [one.boxes for one in found], [one.labels for one in found], names=names,
                                classes=classes), Path(stem), up, heading, ply)
    if isinstance(found[0], PartPrediction):
        colors = [palette(one.parts) for one in found]
        if found[0].part_names is not None:
            shown = sorted({part for one in found for part in one.parts.tolist()})
            legend = {found[0].part_names[part]: PALETTE[part % len(PALETTE)] for part in shown}
        return _write(dict(clouds=inputs, titles=names, colors=colors, legend=legend, columns=4), Path(stem), up,
                      heading, ply)
    titles = [f'{one.class_name} {one.score:.2f}' for one in found]
    if np.ndim(inputs[0]) == 3:
        images = [np.repeat(image, 3, -1) if image.shape[-1] == 1 else image for image in map(np.asarray, inputs)]
        return _write(dict(images=images, titles=titles), Path(stem), up, heading, ply)
    return _write(dict(clouds=inputs, titles=titles, columns=4), Path(stem), up, heading, ply)


def _write(cells: Mapping, stem: Path, up: str, heading: str, ply: bool) -> list[Path]:
    """The files of cells, which are keywords of ``draw_images`` or ``draw_clouds``."""
    png = stem.with_name(f'{stem.name}.png')
    if 'images' in cells:
        draw_images(path=png, heading=heading, **cells)
        picture = base64.b64encode(png.read_bytes()).decode('ascii')
        body = f'<h1>{html.escape(heading)}</h1><img alt="" style="width:100%;image-rendering:pixelated" ' \
               f'src="data:image/png;base64,{picture}">'
        return [png, atomic_write(png.with_suffix('.html'), page(heading, body))]
    columns = min(cells['columns'], len(cells['clouds']))
    written = [draw_clouds(path=png, up=up, heading=heading, size=min(max(2.2, 9 / columns), 5), **cells)]
    turned = {key: cells[key] for key in ('clouds', 'titles', 'colors', 'columns', 'legend') if key in cells}
    written.append(write_html(path=png.with_suffix('.html'), up=up, heading=heading, **turned))
    colors = cells.get('colors') or [None] * len(cells['clouds'])
    return written + [write_ply(stem.with_name(f'{stem.name}_{i}.ply'), cloud, color)
                      for i, (cloud, color) in enumerate(zip(cells['clouds'], colors)) if ply]


def sample_cells(items: Sequence[Mapping], dataset, predicted: bool = False) -> dict:
    """Keywords for :func:`ewa3d.visualization.draw_clouds`, or, with ``images``, for ``draw_images``.

    Raises:
        KeyError: inputs that cannot be drawn. ValueError: clips of different lengths.
    """
    metainfo = getattr(dataset, 'metainfo', None) or {}
    classes, samples = list(metainfo.get('classes') or ()), [item['data_samples'] for item in items]
    inputs = [item['inputs'] for item in items]
    if 'points' in inputs[0] and 'gt_boxes' in samples[0]:
        return _boxes(inputs, samples, classes, predicted)
    if 'points' in inputs[0] and predicted and 'part_scores' in samples[0]:
        found = [_restricted(s, metainfo.get('parts')).argmax(-1) for s in samples]
        truth, names = [s.gt_parts for s in samples], list(map(_name, samples))
        return part_cells([x['points'] for x in inputs], truth, found, names)
    titles, marks = zip(*(_title(sample, classes, predicted) for sample in samples))
    key = next((key for key in ('points', 'img', 'video') if key in inputs[0]), None)
    if key is None:
        raise KeyError(f'inputs with points, img or video can be drawn, these have {", ".join(inputs[0])}')
    if key == 'points' and inputs[0]['points'].ndim == 2:
        plain = [palette(s.gt_parts) if 'gt_parts' in s else WRONG if mark == WRONG else PLAIN
                 for s, mark in zip(samples, marks)]
        return dict(clouds=[x['points'] for x in inputs], titles=titles, title_colors=marks, colors=plain,
                    columns=min(4, len(items)))
    if key == 'img':
        return dict(images=[_shown(x['img'], dataset) for x in inputs], titles=titles, title_colors=marks)
    clips = [x[key].flatten(0, x[key].ndim - (4 if key == 'video' else 3)) for x in inputs]  # views one after another
    frames = [frame for clip in clips for frame in clip]
    width = max(map(len, clips))
    if any(len(clip) != width for clip in clips):
        raise ValueError('clips of one picture need as many frames each')
    titles = [title if i == 0 else '' for title in titles for i in range(width)]
    marks = [mark for mark in marks for _ in range(width)]
    if key == 'points':
        return dict(clouds=frames, titles=titles, title_colors=marks, columns=width)
    return dict(images=[_shown(frame, dataset) for frame in frames], titles=titles, title_colors=marks, columns=width)


def by_source(dataset, num: int) -> Iterator[tuple[str, object, list[int]]]:
    """Name (``''`` of a single data set), data set and up to ``num`` indices, spread evenly, of each source of a
    mixture."""
    if hasattr(dataset, 'names') and hasattr(dataset, 'datasets'):
        sources = zip(dataset.names, dataset.datasets)
    else:
        sources = [('', dataset)]
    for name, source in sources:
        count = min(num, len(source))
        yield name, source, [i * len(source) // count for i in range(count)]


def _boxes(inputs: Sequence[Mapping], samples: Sequence, classes: Sequence[str], predicted: bool) -> dict:
    found = {}
    if predicted:
        kept = [s.pred_objectness > OBJECTNESS for s in samples]
        found = dict(predicted=[s.pred_boxes[rows] for s, rows in zip(samples, kept)],
                     predicted_labels=[s.pred_scores[rows].argmax(-1) for s, rows in zip(samples, kept)])
    return box_cells([x['points'] for x in inputs], [s.gt_boxes for s in samples], [s.gt_labels for s in samples],
                     names=list(map(_name, samples)), classes=classes or None, **found)


def _restricted(sample, parts: Mapping | None) -> Tensor:
    """Scores of the parts that the sample's category has."""
    scores = sample.part_scores
    ids = list(parts.values())[int(sample.gt_label)] if parts and 'gt_label' in sample else range(scores.shape[1])
    allowed = torch.isin(torch.arange(scores.shape[1]), torch.tensor(list(ids)))
    return scores.cpu().masked_fill(~allowed, -math.inf)


def _title(sample, classes: Sequence[str], predicted: bool) -> tuple[str, str]:
    """What stands below a sample, and its colour."""
    def named(label) -> str:
        return classes[int(label)] if int(label) < len(classes) else str(int(label))
    truth = named(sample.gt_label) if 'gt_label' in sample else ''
    if not predicted or 'pred_label' not in sample:
        return truth or _name(sample), '#23272f'
    found = named(sample.pred_label)
    if not truth or truth == found:
        return f'✓ {found}' if truth else found, RIGHT
    return f'✗ {found}, is {truth}', WRONG


def _name(sample) -> str:
    return str(sample.get('name', sample.get('index', '')))


def _shown(img: Tensor, dataset) -> np.ndarray:
    """An image ``(C, H, W)`` as ``(H, W, 3)`` in [0, 1], the normalisation of the pipeline's last step undone."""
    while not hasattr(dataset, 'pipeline') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset
    last = (getattr(dataset, 'pipeline', None) or [None])[-1]
    mean, std = getattr(last, 'mean', None), getattr(last, 'std', None)
    img = img.float().cpu()
    img = img if mean is None else img * std + mean
    img = img if len(img) == 3 else img[:1].expand(3, -1, -1)
    return img.clamp(0, 1).permute(1, 2, 0).numpy()
