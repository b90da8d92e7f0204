"""Boxes over points: cells for the pictures of :mod:`ewa3d.visualization` and the pages of :mod:`ewa3d.viewer`.

The edges of a box are drawn as dense points of its colour, so that both need to know of nothing but clouds.
"""
from collections.abc import Sequence

import numpy as np
import torch

from ewa3d.ops.boxes import box3d_corners, check_boxes
from ewa3d.visualization import GREY, PALETTE, cloud_array, listed, palette, per_cloud, point_colors

__all__ = ['box_cells', 'box_edges']

EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
EDGE_POINTS = 200  # along the longest extent of the scene


def box_cells(clouds: Sequence, boxes: Sequence, labels: Sequence | None = None, predicted: Sequence | None = None,
              predicted_labels: Sequence | None = None, names: Sequence[str] | None = None,
              classes: Sequence[str] | None = None) -> dict:
    """Keywords for :func:`ewa3d.visualization.draw_clouds` and :func:`ewa3d.viewer.write_html`: each scene in grey with
    its boxes in the colours of their classes and, where there are predictions, once more with those.

    Args:
        clouds: ``(N_i, 3 + F)``. boxes, predicted: ``(M_i, 7)``, none or more.
        labels, predicted_labels: ``(M_i,)``; without them all boxes have one colour.
        names: of the scenes. classes: names of the labels, for the legend.

    Raises:
        TypeError, ValueError: lists of different lengths, no cloud, no boxes ``(M, 7)``, values that are not finite.
    """
    clouds = listed(clouds, 'clouds')
    count, cells, shown = len(clouds), [], set()
    names = per_cloud(names, count, '', 'names')
    kinds = [('boxes', '', per_cloud(boxes, count, None, 'boxes'), per_cloud(labels, count, None, 'labels'))]
    if predicted is not None:
        kinds.append(('predicted', 'predicted', per_cloud(predicted, count, None, 'predicted'),
                      per_cloud(predicted_labels, count, None, 'predicted_labels')))
    for i, cloud in enumerate(clouds):
        points = cloud_array(cloud, f'clouds[{i}]')
        step = float((points.max(0) - points.min(0)).max()) / EDGE_POINTS
        for kind, title, given, tags in kinds:
            edges, owner = box_edges(given[i], step, f'{kind}[{i}]')
            tag = np.zeros(len(given[i]), np.int64) if tags[i] is None else np.asarray(tags[i], np.int64)
            if len(tag) != len(given[i]):
                raise ValueError(f'{kind}[{i}] has {len(given[i])} boxes and {len(tag)} labels; expected as many')
            rgb = np.concatenate([point_colors(GREY, len(points), ''), palette(tag[owner])])
            cells.append((np.concatenate([points, edges]), rgb, _title(title or names[i], len(tag))))
            shown.update(() if tags[i] is None else tag.tolist())
    arrays, colors, titles = map(list, zip(*cells))
    legend = {classes[k]: PALETTE[k % len(PALETTE)] for k in sorted(shown)} if classes is not None else {}
    return dict(clouds=arrays, colors=colors, titles=titles, legend=legend,
                columns=len(kinds) if len(kinds) > 1 else min(3, count))


def box_edges(boxes, step: float, name: str = 'boxes') -> tuple[np.ndarray, np.ndarray]:
    """Points along the edges of boxes, about ``step`` apart, and the box of each.

    Shape:
        - boxes ``(M, 7)``; returns ``(P, 3)`` float64 and ``(P,)`` int64.

    Raises:
        ValueError: another shape, or numbers that are not finite.
    """
    boxes = torch.as_tensor(boxes).detach().cpu().double()
    check_boxes(boxes, name)
    if boxes.ndim != 2 or not bool(boxes.isfinite().all()):
        raise ValueError(f'{name} must be (M, 7) finite numbers, got the shape {tuple(boxes.shape)}')
    found, owner = [np.zeros((0, 3))], [np.zeros(0, np.int64)]
    for i, corners in enumerate(box3d_corners(boxes).numpy()):
        for first, last in EDGES:
            length = np.linalg.norm(corners[last] - corners[first])
            share = np.linspace(0, 1, int(np.clip(length / max(step, 1e-12), 1, 10 * EDGE_POINTS)) + 1)[:, None]
            found.append(corners[first] + share * (corners[last] - corners[first]))
            owner.append(np.full(len(share), i))
    return np.concatenate(found), np.concatenate(owner)


def _title(title: str, boxes: int) -> str:
    counted = f'{boxes} box{"" if boxes == 1 else "es"}'
    return f'{title}: {counted}' if title else counted
