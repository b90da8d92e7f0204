"""Chamfer distance between point sets: many small patches or a few whole clouds.

Nearest neighbours are found without a gradient, the distances to them are computed again with one: the backward is a
scatter of ``N + M`` rows, and no matrix of all pairs is kept. On a CPU whole clouds are searched by k-d trees, where
scipy is installed.
"""
import numpy as np
import torch
from torch import Tensor

from ewa3d.ops import backends
from ewa3d.ops.points import CHUNK, DEVICE_CHUNK, check_points, gather, search_clouds, tree_class
from ewa3d.registry import nearest as nearest_names

__all__ = ['chamfer_distance', 'nearest_squared']

TREE_POINTS = 512  # from this size on a k-d tree costs less than comparing every pair for the one nearest
NORMS, REDUCTIONS = ('l1', 'l2'), ('mean', 'none')


def chamfer_distance(x: Tensor, y: Tensor, norm: str = 'l2', reduction: str = 'mean', backend: str = 'auto') -> Tensor:
    """The distance of each point to the nearest one of the other set, both ways (Fan et al. 2017).

    With the mean over the points of a set: ``'l2'`` is ``mean d²(x→y) + mean d²(y→x)`` (Point-MAE's loss), ``'l1'``
    is ``(mean d(x→y) + mean d(y→x)) / 2`` (Point-BERT's tokenizer).

    Half precision is computed in float32. Of equally near points one takes the gradient. At a distance of 0, where the
    slope of a root is infinite and published ``'l1'`` losses give NaN, the gradient is 0.

    Args:
        norm: ``'l1'`` or ``'l2'``.
        reduction: ``'mean'`` over the batch, or ``'none'``.
        backend: ``'auto'``, ``'torch'`` or ``'pytorch3d'`` (:mod:`ewa3d.ops.backends`), for finding the nearest.

    Shape:
        - x ``(B, N, 3)``, y ``(B, M, 3)``; returns ``()``, or ``(B,)`` with ``reduction='none'``.

    Raises:
        TypeError, ValueError: other shapes, an empty set or batch, coordinates that are not finite (looked at on a CPU
            only), an unknown ``norm``, ``reduction`` or ``backend``, or one that cannot do it.
        ImportError: a backend that is not installed.
    """
    for name, value, valid in (('norm', norm, NORMS), ('reduction', reduction, REDUCTIONS)):
        if value not in valid:
            raise ValueError(f'chamfer_distance: {name}={value!r}; {nearest_names(value, valid)}')
    x, y = _checked(x, y)
    ways = [_to_nearest(x, y, backend), _to_nearest(y, x, backend)]  # (B, N, 3), (B, M, 3)
    if norm == 'l1':  # the norm's gradient at 0 is defined, that of a root is not
        there, back = (torch.linalg.vector_norm(way, dim=-1).mean(1) for way in ways)
        distance = (there + back) / 2
    else:
        there, back = (way.square().sum(-1).mean(1) for way in ways)
        distance = there + back
    return distance.mean() if reduction == 'mean' else distance


def nearest_squared(x: Tensor, y: Tensor, backend: str = 'auto') -> Tensor:
    """The squared distance of each point of ``x`` to the nearest of ``y``, differentiable with respect to both.

    Shape:
        - x ``(B, N, 3)``, y ``(B, M, 3)``; returns ``(B, N)``.

    Raises:
        TypeError, ValueError: as :func:`chamfer_distance`.
    """
    return _to_nearest(*_checked(x, y), backend).square().sum(-1)


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets in one dtype of at least single precision."""
    for name, points in (('x', x), ('y', y)):
        check_points(points, f'chamfer_distance: {name}')
        if 0 in points.shape:
            raise ValueError(f'chamfer_distance: {name} is empty: its shape is {tuple(points.shape)}')
    if len(x) != len(y):
        raise ValueError(f'chamfer_distance: x has {len(x)} clouds and y {len(y)}; as many were expected')
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def _to_nearest(x: Tensor, y: Tensor, backend: str) -> Tensor:
    """``(B, N, 3)``: what separates each point of ``x`` from the nearest of ``y``."""
    with torch.no_grad():
        search = _nearest_op if torch.compiler.is_compiling() else _nearest
        index = search(x.detach(), y.detach(), backend)
    return x - gather(y, index)


def _nearest(x: Tensor, y: Tensor, backend: str = 'auto') -> Tensor:
    """``(B, N)``: the index of the nearest point of ``y`` for each of ``x``."""
    module = backends.pytorch3d_for(backend, x, y)
    if module is not None:
        return backends.nearest(module, x, y)
    on_cpu = x.device.type == 'cpu'
    if on_cpu and min(x.shape[1], y.shape[1]) >= TREE_POINTS and tree_class() is not None:
        return search_clouds(_search_nearest, x, y, 1).squeeze(-1)
    limit, M = CHUNK if on_cpu else DEVICE_CHUNK, y.shape[1]
    clouds = max(1, limit // (x.shape[1] * M))  # at a time
    rows = max(1, limit // M) if clouds == 1 else x.shape[1]
    return torch.cat([torch.cat([_compare(part, points) for part in queries.split(rows, 1)], 1)
                      for queries, points in zip(x.split(clouds), y.split(clouds))])


def _compare(x: Tensor, y: Tensor) -> Tensor:
    """The nearest by the distances of all pairs, from differences: exact far from the origin, unlike products."""
    distance = None
    for axis in range(3):
        term = (x[..., axis].unsqueeze(-1) - y[..., axis].unsqueeze(-2)).square_()
        distance = term if distance is None else distance.add_(term)
    return distance.argmin(-1)


def _search_nearest(x: np.ndarray, y: np.ndarray, found: np.ndarray, workers: int) -> None:
    """One cloud, into ``found`` ``(N, 1)``. Of equally near points a tree takes whichever it meets first."""
    tree = tree_class()(y, balanced_tree=False, compact_nodes=False)
    found[:, 0] = tree.query(x, workers=workers)[1]


@torch.library.custom_op('ewa3d::nearest', mutates_args=())
def _nearest_op(x: Tensor, y: Tensor, backend: str) -> Tensor:
    return _nearest(x, y, backend)


@_nearest_op.register_fake
def _(x, y, backend):
    return x.new_empty(x.shape[:2], dtype=torch.int64)
