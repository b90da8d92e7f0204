"""All pairs of rotated boxes: at once, against a loop over polygons."""
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ewa3d.bench.harness import Case, Settings

__all__ = ['cases', 'clip_convex', 'iou_loop', 'overlap_plain', 'overlap_shapely', 'room_boxes']

SIZES, QUICK_SIZES = ((8, 128, 64),), ((2, 4, 3),)  # scenes, predicted boxes, true boxes
POINTS, QUICK_POINTS = (8, 64, 20_000), (2, 3, 50)  # scenes, boxes, points


def cases(settings: Settings) -> Iterator[Case]:
    """IoU of all pairs, forward and with the gradient of GIoU, and points in boxes."""
    from ewa3d import ops
    loops = {'loop, plain Python': overlap_plain}
    if importlib.util.find_spec('shapely') is not None:
        loops['loop, shapely'] = overlap_shapely
    for scenes, predicted, true in QUICK_SIZES if settings.quick else SIZES:
        a, b = (room_boxes(scenes, count, settings) for count in (predicted, true))
        name = f'{scenes}×({predicted}, {true})'
        yield Case(f'box3d_iou {name}', {**{loop: partial(_bound, iou_loop, a, b, overlap)
                                            for loop, overlap in loops.items()},
                                         'ewa3d': partial(_bound, ops.box3d_iou, a, b)})
        yield Case(f'box3d_giou {name}', {'forward': partial(_bound, ops.box3d_giou, a, b),
                                          'forward and backward': partial(_trained, ops.box3d_giou, a, b)}, memory=True)
    scenes, count, points = QUICK_POINTS if settings.quick else POINTS
    boxes, cloud = room_boxes(scenes, count, settings), 8 * torch.rand(scenes, points, 3, device=settings.device)
    yield Case(f'points_in_boxes {scenes}×({points}, {count})', {
        'all pairs': partial(_bound, points_in_boxes_naive, cloud, boxes),
        'ewa3d': partial(_bound, ops.points_in_boxes, cloud, boxes)}, memory=True)


def room_boxes(scenes: int, count: int, settings: Settings) -> Tensor:
    """Boxes like those of furniture in a room of 8 m, with any heading; ``(scenes, count, 7)``."""
    generator = torch.Generator().manual_seed(settings.seed + count)
    low, high = torch.tensor([[0, 0, 0, .3, .3, .3, -3.15], [8, 8, 2, 2, 2, 2, 3.15]])
    return (low + (high - low) * torch.rand(scenes, count, 7, generator=generator)).to(settings.device)


def iou_loop(a: Tensor, b: Tensor, overlap: Callable) -> Tensor:
    """IoU ``(B, N, M)`` in float64, one pair after the other; ``overlap`` gives the common areas of two lists of
    quadrilaterals seen from above."""
    a, b = (boxes.detach().cpu().double().numpy() for boxes in (a, b))
    found = np.zeros((len(a), a.shape[1], b.shape[1]))
    for scene in range(len(a)):
        areas = overlap([rectangle(box) for box in a[scene]], [rectangle(box) for box in b[scene]])
        for i, p in enumerate(a[scene]):
            for j, q in enumerate(b[scene]):
                height = min(p[2] + p[5] / 2, q[2] + q[5] / 2) - max(p[2] - p[5] / 2, q[2] - q[5] / 2)
                common = areas[i][j] * max(height, 0.)
                union = p[3] * p[4] * p[5] + q[3] * q[4] * q[5] - common
                found[scene, i, j] = common / union if union > 0 else 0.
    return torch.from_numpy(found)


def rectangle(box: np.ndarray) -> list[tuple[float, float]]:
    """A box seen from above, counter-clockwise."""
    x, y, dx, dy, yaw = (float(box[i]) for i in (0, 1, 3, 4, 6))
    cos, sin = np.cos(yaw), np.sin(yaw)
    return [(x + u * dx / 2 * cos - v * dy / 2 * sin, y + u * dx / 2 * sin + v * dy / 2 * cos)
            for u, v in ((1, 1), (-1, 1), (-1, -1), (1, -1))]


def overlap_plain(first: list, second: list) -> list[list[float]]:
    """The common areas of all pairs of convex polygons, lists of ``(x, y)``, in plain Python."""
    return [[area(clip_convex(p, q)) for q in second] for p in first]


def overlap_shapely(first: list, second: list) -> list[list[float]]:
    """The same by shapely."""
    from shapely.geometry import Polygon
    first, second = map(Polygon, first), list(map(Polygon, second))
    return [[p.intersection(q).area for q in second] for p in first]


def clip_convex(polygon: list, window: list) -> list:
    """Sutherland and Hodgman: a polygon cut by each edge of a convex one, both counter-clockwise."""
    for (x0, y0), (x1, y1) in zip(window, window[1:] + window[:1]):
        sides = [(x1 - x0) * (y - y0) - (y1 - y0) * (x - x0) for x, y in polygon]
        kept = []
        for p, q, s, t in zip(polygon, polygon[1:] + polygon[:1], sides, sides[1:] + sides[:1]):
            if s >= 0:
                kept.append(p)
            if (s > 0 > t) or (s < 0 < t):
                share = s / (s - t)
                kept.append((p[0] + share * (q[0] - p[0]), p[1] + share * (q[1] - p[1])))
        polygon = kept
    return polygon


def area(polygon: list) -> float:
    """Of a polygon whose corners run counter-clockwise."""
    if len(polygon) < 3:
        return 0.
    x0, y0 = polygon[0]
    return max(0., sum((p[0] - x0) * (q[1] - y0) - (q[0] - x0) * (p[1] - y0)
                       for p, q in zip(polygon, polygon[1:] + polygon[:1])) / 2)


def points_in_boxes_naive(points: Tensor, boxes: Tensor) -> Tensor:
    """All points in the frames of all boxes at once; ``(B, N, P)``."""
    offset = points[:, None, :, :3] - boxes[:, :, None, :3]
    cos, sin = boxes[..., 6].cos(), boxes[..., 6].sin()
    zero = torch.zeros_like(cos)
    turn = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1),
                        torch.stack([zero, zero, zero + 1], -1)], -2)  # (B, N, 3, 3)
    return ((offset @ turn).abs() <= boxes[:, :, None, 3:6] / 2).all(-1)


def _bound(function, *args):
    def call():
        with torch.no_grad():
            return function(*args)
    return call


def _trained(function, a: Tensor, b: Tensor):
    a = a.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(a, b).sum(), a)
