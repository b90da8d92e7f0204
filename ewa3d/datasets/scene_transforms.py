"""Transforms of scenes: they move points and boxes together (see :mod:`ewa3d.datasets.transforms`)."""
from collections.abc import Sequence

import numpy as np
import torch

from ewa3d.checks import check_integer, check_number
from ewa3d.datasets.transforms import Pack, linear_map, rng_of, rotation, span, take, with_xyz
from ewa3d.registry import TRANSFORMS

__all__ = ['AddHeight', 'PackBoxes', 'RandomCuboid', 'SceneFlip', 'SceneRotate', 'SceneScale']


def boxes_of(results: dict) -> np.ndarray:
    """A copy of the scene's boxes."""
    if results.get('boxes') is None:
        raise ValueError("the sample has no 'boxes'; a scene without any has boxes (0, 7)")
    return np.array(results['boxes'], np.float32)


@TRANSFORMS.register_module()
class RandomCuboid:
    """Cut a random cuboid out of the scene, as DepthContrast and 3DETR do: centred on a random point, each side a
    share of the scene's extent. Boxes with their centre inside stay, whole.

    A cuboid is taken when it has ``min_points`` points, one pair of its shares at least has a ratio of ``aspect`` or
    more, and a box stays; after ``tries`` the scene is left as it is. Scenes without boxes are cut as well.

    Args:
        min_points: points that a cuboid has at least.
        aspect: the least ratio of the shares of one pair of sides. tries: cuboids that are drawn at most.
        crop: smallest and largest share of the extent.
    """

    def __init__(self, min_points: int = 30_000, aspect: float = 0.8, crop: Sequence[float] = (0.5, 1.0),
                 tries: int = 100):
        self.min_points = check_integer('RandomCuboid: min_points', min_points, 1)
        self.aspect = check_number('RandomCuboid: aspect', aspect)
        self.crop = span('RandomCuboid: crop', crop, '(0, 1]')
        self.tries = check_integer('RandomCuboid: tries', tries, 1)

    def __call__(self, results: dict) -> dict:
        rng, xyz, boxes = rng_of(results), results['points'][:, :3], boxes_of(results)
        if len(xyz) < self.min_points:
            return results
        axes = np.ascontiguousarray(xyz.T)  # numpy is slow at rows of three
        extent = axes.max(1) - axes.min(1)
        for _ in range(self.tries):
            share = rng.uniform(*self.crop, size=3)
            pairs = [min(share[i], share[j]) / max(share[i], share[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
            if max(pairs) < self.aspect:
                continue
            centre, half = xyz[rng.integers(len(xyz))], share * extent / 2
            inside = within(axes, centre, half, self.min_points)
            if inside is None:
                continue
            kept = (np.abs(boxes[:, :3] - centre) <= half).all(1)
            if not kept.any() and len(boxes):
                continue
            results.update(boxes=boxes[kept], box_labels=results['box_labels'][kept])
            return take(results, np.flatnonzero(inside))
        return results


def within(axes: np.ndarray, centre: np.ndarray, half: np.ndarray, least: int) -> np.ndarray | None:
    """Which points ``(3, N)`` lie in a cuboid; ``None`` where there are fewer than ``least``, as soon as that shows."""
    inside = None
    for i, axis in enumerate(axes):
        near = np.abs(axis - centre[i]) <= half[i:i + 1]  # an array: compared in double precision by any numpy
        inside = near if inside is None else np.logical_and(inside, near, out=inside)
        if np.count_nonzero(inside) < least:
            return None
    return inside


@TRANSFORMS.register_module()
class SceneFlip:
    """Mirror the scene: each of ``axes`` with probability ``p`` (``'x'`` turns x into −x).

    Args:
        axes: of ``'x'``, ``'y'``, ``'xy'``. p: probability of each.

    Raises:
        TypeError, ValueError: other axes, or no probability.
    """

    def __init__(self, axes: str = 'x', p: float = 0.5):
        if not isinstance(axes, str) or not axes or set(axes) - set('xy'):
            raise ValueError(f"SceneFlip: axes must be 'x', 'y' or 'xy', got {axes!r}")
        self.axes, self.p = axes, check_number('SceneFlip: p', p)

    def __call__(self, results: dict) -> dict:
        for axis in self.axes:
            if rng_of(results).random() < self.p:
                i = 'xy'.index(axis)
                boxes, matrix = boxes_of(results), np.eye(3)
                matrix[i, i] = -1
                boxes[:, i] *= -1
                boxes[:, 6] = wrapped(np.pi - boxes[:, 6]) if axis == 'x' else -boxes[:, 6]
                results = {**linear_map(results, matrix), 'boxes': boxes}
        return results


@TRANSFORMS.register_module()
class SceneRotate:
    """Turn the scene about the z axis by an angle drawn from ``[-degrees, degrees]`` (or from a pair).

    Args:
        degrees: the largest angle to either side, or the smallest and the largest.
        refit: boxes stay along the axes: each becomes the hull of the turned one, as for ScanNet, whose boxes have no
            heading.
    """

    def __init__(self, degrees: float | Sequence[float] = 30, refit: bool = False):
        self.degrees, self.refit = span('SceneRotate: degrees', degrees), bool(refit)

    def __call__(self, results: dict) -> dict:
        angle = np.deg2rad(rng_of(results).uniform(*self.degrees))
        boxes, matrix = boxes_of(results), rotation(2, angle)
        boxes[:, :3] = boxes[:, :3] @ matrix.T
        boxes[:, 6] = wrapped(boxes[:, 6] + angle)
        if self.refit:
            cos, sin = np.abs(np.cos(boxes[:, 6])), np.abs(np.sin(boxes[:, 6]))
            dx, dy = boxes[:, 3].copy(), boxes[:, 4].copy()
            boxes[:, 3], boxes[:, 4], boxes[:, 6] = dx * cos + dy * sin, dx * sin + dy * cos, 0
        return {**linear_map(results, matrix), 'boxes': boxes}


@TRANSFORMS.register_module()
class SceneScale:
    """Multiply the scene by one factor drawn from ``scale``, height feature included.

    Args:
        scale: the smallest and the largest factor.
    """

    def __init__(self, scale: Sequence[float] = (0.85, 1.15)):
        self.scale = span('SceneScale: scale', scale, '(0, inf)')

    def __call__(self, results: dict) -> dict:
        factor = np.float32(rng_of(results).uniform(*self.scale))
        boxes = boxes_of(results)
        boxes[:, :6] *= factor
        results = {**with_xyz(results, results['points'][:, :3] * factor), 'boxes': boxes}
        if results.get('height'):
            results['points'] = np.concatenate([results['points'][:, :-1], results['points'][:, -1:] * factor], axis=1)
        return results


@TRANSFORMS.register_module()
class AddHeight:
    """Append the height above the floor as the last column; the floor is a low percentile of z, as in VoteNet.

    Args:
        percentile: of z, in percent, that counts as the floor.
    """

    def __init__(self, percentile: float = 0.99):
        self.percentile = check_number('AddHeight: percentile', percentile, '[0, 100]')

    def __call__(self, results: dict) -> dict:
        points = results['points']
        height = points[:, 2:3] - np.percentile(points[:, 2], self.percentile).astype(points.dtype)
        return {**results, 'points': np.concatenate([points, height], axis=1), 'height': True}


@TRANSFORMS.register_module()
class PackBoxes(Pack):
    """:class:`~ewa3d.datasets.transforms.Pack` for scenes: the sample has ``gt_boxes`` ``(M, 7)`` float32 and
    ``gt_labels`` ``(M,)`` int64, each scene its own number."""

    def __call__(self, results: dict) -> dict:
        packed = super().__call__(results)
        packed['data_samples'].gt_boxes = torch.from_numpy(boxes_of(results))
        packed['data_samples'].gt_labels = torch.from_numpy(np.array(results['box_labels'], np.int64))
        return packed


def wrapped(angle: np.ndarray) -> np.ndarray:
    """Angles in [−π, π)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi
