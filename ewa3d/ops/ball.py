"""Ball query: which points lie around others."""
import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ewa3d.checks import check_integer, check_number
from ewa3d.ops import backends
from ewa3d.ops import points as base

__all__ = ['ball_query']

DENSE = 16  # balls that hold more than this times k points are scanned, where a tree would list all of them


def ball_query(query: Tensor, points: Tensor, radius: float, k: int, backend: str = 'auto') -> Tensor:
    """The first ``k`` points, in the order of their indices, that are nearer than ``radius`` to each query; a ball that
    holds fewer repeats the first of them. The semantics of PointNet++'s kernel (Qi et al. 2017).

    A query without any point gets index 0, as there. Distances are computed in the dtype of ``points`` (half precision:
    in float32).

    Args:
        backend: ``'auto'``, ``'torch'`` or ``'pytorch3d'`` (:mod:`ewa3d.ops.backends`).

    Shape:
        - query ``(B, M, 3)``, points ``(B, N, 3)``; returns ``(B, M, k)`` int64.

    Raises:
        TypeError, ValueError: a radius or ``k`` that is no positive number, no points, coordinates that are not finite,
            shapes that do not fit, a backend that does not exist or cannot do it.
        ImportError: a backend that is not installed.
    """
    base.check_points(points)
    base.check_points(query, 'query')
    if query.shape[0] != points.shape[0]:
        raise ValueError(f'ball_query: {query.shape[0]} sets of queries for {points.shape[0]} clouds')
    if points.shape[1] < 1:
        raise ValueError('ball_query: the clouds have no points (N=0)')
    radius = check_number('ball_query: radius', radius, '(0, inf)')
    k = check_integer('ball_query: k', k, 1)
    with torch.no_grad():
        query, points = base._single(query.detach()), base._single(points.detach())
        return (_ball_query_op if base._compiling() else _ball_query)(query, points.to(query.dtype), radius, k,
                                                                              backend)


def _ball_query(query: Tensor, points: Tensor, radius: float, k: int, backend: str) -> Tensor:
    if base._tracing():
        return _first_hits(query, points, radius, k)
    module = backends.pytorch3d_for(backend, query, points)
    if module is not None:
        return backends.ball_query(module, query, points, radius, k)
    large = points.shape[1] >= base.TREE_POINTS and query.shape[1] >= base.TREE_QUERIES
    if points.device.type == 'cpu' and large and len(points) and base.tree_class() is not None:
        dtype = points.numpy().dtype
        return base.search_clouds(functools.partial(_search_tree, radius=radius, dtype=dtype), query, points, k)
    return _by_scan(query, points, radius, k)


def _by_scan(query: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """Every pair, as many queries at a time as fit the cache, or as ``DEVICE_CHUNK`` allows."""
    limit = base.CHUNK if points.device.type == 'cpu' else base.DEVICE_CHUNK
    rows = max(1, limit // max(1, points.shape[0] * points.shape[1]))
    parts = query.split(rows, 1)
    return torch.cat([_first_hits(part, points, radius, k) for part in parts], 1)


def _first_hits(query: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """Where the running count of hits reaches 1, 2, … k: no sorting, and no size that depends on the values. Exported,
    the ``k`` smallest numbers of hits."""
    x, y, z = ((query[..., i].unsqueeze(-1) - points[..., i].unsqueeze(-2)).square() for i in range(3))
    inside = x + y + z < radius ** 2  # (B, m, N)
    if base.exporting():
        N = points.shape[1]
        numbers = torch.where(inside, torch.arange(N, device=points.device), N)
        idx = numbers.topk(min(k, N), dim=-1, largest=False)[0]
        return _filled(F.pad(idx, (0, k - idx.shape[-1]), value=N) if k > N else idx, N)
    counted = inside.cumsum(-1, dtype=torch.int32)
    ranks = torch.arange(1, k + 1, dtype=torch.int32, device=points.device).expand(*counted.shape[:2], k)
    idx = torch.searchsorted(counted, ranks.contiguous())  # (B, m, k), N where there are fewer
    return _filled(idx, points.shape[1])


def _filled(idx: Tensor, N: int) -> Tensor:
    """Numbers of hits with the first of a ball, or 0, in place of those that are missing, which are ``N``."""
    idx = torch.where(idx < N, idx, idx[..., :1])
    return idx.masked_fill(idx == N, 0)


def _search_tree(query: np.ndarray, points: np.ndarray, found: np.ndarray, workers: int, radius: float, dtype) -> None:
    """One cloud, into ``found`` ``(M, k)``: a tree names the candidates, which are then compared as anywhere else."""
    M, k = found.shape
    tree = base.tree_class()(points, balanced_tree=False, compact_nodes=False)
    scale = max(np.abs(points).max(), np.abs(query).max(), radius)
    reach = radius + 8 * np.finfo(dtype).eps * scale
    dense = tree.query_ball_point(query, reach, return_length=True, workers=workers) > DENSE * k
    if dense.any():
        some, cloud = (torch.from_numpy(array.astype(dtype))[None] for array in (query[dense], points))
        found[dense] = _by_scan(some, cloud, radius, k)[0].numpy()
    hits = tree.query_ball_point(query[~dense], reach, workers=workers)
    counts = np.fromiter(map(len, hits), np.int64, len(hits))
    candidates = np.fromiter(itertools.chain.from_iterable(hits), np.int64, counts.sum())
    rows = np.repeat(np.flatnonzero(~dense), counts)
    x, y, z = np.square(query[rows].astype(dtype) - points[candidates].astype(dtype)).T
    inside = x + y + z < radius ** 2
    order = np.sort((rows * len(points) + candidates)[inside])
    rows, candidates = np.divmod(order, len(points))
    counts = np.bincount(rows, minlength=M)
    first = np.cumsum(counts) - counts
    rank = np.arange(len(rows)) - first[rows]
    found[~dense] = np.where(counts > 0, candidates[np.minimum(first, len(rows) - 1)], 0)[~dense, None] \
        if len(rows) else 0
    kept = rank < k
    found[rows[kept], rank[kept]] = candidates[kept]


@torch.library.custom_op('ewa3d::ball_query', mutates_args=())
def _ball_query_op(query: Tensor, points: Tensor, radius: float, k: int, backend: str) -> Tensor:
    return _ball_query(query, points, radius, k, backend)


@_ball_query_op.register_fake
def _(query, points, radius, k, backend):
    return query.new_empty(*query.shape[:2], k, dtype=torch.int64)
