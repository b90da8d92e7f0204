"""Operators on point sets: nearest neighbours, gathering; what all operators on points share.

Every function takes a batch of clouds on any device and needs torch alone. On a CPU the inner selections use numpy and,
where it is installed, scipy, whose ``argmax``, ``partition`` and k-d tree are several times faster than torch's; the
results are the same.
Indices carry no gradient; ``gather`` and the distances of ``knn`` do.
"""
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ewa3d.checks import check_integer
from ewa3d.ops import backends

__all__ = ['knn', 'neighbours', 'gather', 'check_points']

TREE_POINTS, TREE_QUERIES = 2048, 64  # from these sizes on a k-d tree costs less than comparing every pair
LEAF = 32  # points in a leaf of a tree; scipy's 16 is slower to build and not faster to search
CHUNK = 1 << 17  # distances held at a time on a CPU: what stays in the cache
DEVICE_CHUNK = 1 << 26  # and elsewhere: half a GiB


def check_points(points: Tensor, name: str = 'points') -> None:
    """Raise unless ``points`` is a floating ``(B, N, 3)`` tensor without NaN or infinity.

    The values are looked at on a CPU only: elsewhere that would wait for the device (``Preprocessor`` checks them
    before they get there).

    Raises:
        TypeError: not a floating point tensor.
        ValueError: another shape, or coordinates that are not finite; the message names the samples.
    """
    if not isinstance(points, Tensor) or not points.is_floating_point():
        raise TypeError(f'{name} must be a floating point tensor, got {getattr(points, "dtype", type(points))}')
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f'{name} must have the shape (B, N, 3), got {tuple(points.shape)}')
    if points.device.type == 'cpu' and not _tracing() and not points.detach().sum().isfinite():
        finite = points.isfinite()  # a sum is quick, and may overflow
        if not finite.all():
            bad = (~finite.flatten(1).all(1)).nonzero().flatten().tolist()
            raise ValueError(f'{name} has NaN or infinite coordinates in sample(s) {bad} of the batch')


def knn(query: Tensor, points: Tensor, k: int, backend: str = 'auto') -> tuple[Tensor, Tensor]:
    """The ``k`` nearest points of each query, nearest first; equal distances go to the lowest index.

    The order is that of the distances in float64, formed from differences: no matrix product, which loses recall on
    clouds far from the origin. (Distances that agree to about ten digits count as equal.) The squared distances are
    differentiable with respect to both inputs.

    Args:
        backend: ``'auto'``, ``'torch'`` or ``'pytorch3d'`` (:mod:`ewa3d.ops.backends`).

    Shape:
        - query ``(B, M, 3)``, points ``(B, N, 3)``.
        - returns squared distances ``(B, M, k)`` in the dtype of ``points`` and indices ``(B, M, k)`` int64.

    Raises:
        ValueError: ``k`` larger than ``N``, coordinates that are not finite, shapes that do not fit, a backend that
            does not exist or cannot do it. ImportError: a backend that is not installed.
    """
    idx = neighbours(query, points, k, backend)
    if _tracing():
        return _distances(query, points, idx), idx
    limit = 2 * CHUNK if points.device.type == 'cpu' else DEVICE_CHUNK
    rows = max(1, limit // max(1, len(points) * idx.shape[-1]))
    parts = zip(query.split(rows, 1), idx.split(rows, 1))
    return torch.cat([_distances(part, points, found) for part, found in parts], 1), idx


def _distances(query: Tensor, points: Tensor, idx: Tensor) -> Tensor:
    """``(B, M, k)``, an axis at a time: rows of three are slow."""
    total = None
    for q, p in zip(query.double().unbind(-1), points.double().unbind(-1)):
        term = (p.gather(1, idx.flatten(1)).view(idx.shape) - q.unsqueeze(-1)).square()
        total = term if total is None else total + term
    return total.to(points.dtype)


def neighbours(query: Tensor, points: Tensor, k: int, backend: str = 'auto') -> Tensor:
    """The indices that :func:`knn` returns, without the distances.

    Shape:
        - query ``(B, M, 3)``, points ``(B, N, 3)``; returns ``(B, M, k)`` int64.

    Raises:
        ValueError, TypeError, ImportError: as of :func:`knn`.
    """
    check_points(points)
    check_points(query, 'query')
    if query.shape[0] != points.shape[0]:
        raise ValueError(f'knn: {query.shape[0]} sets of queries for {points.shape[0]} clouds')
    if not _tracing():
        k = check_integer('knn: k', k, 1)
    if not 1 <= k <= points.shape[1]:
        raise ValueError(f'knn: k={k} neighbours cannot be found among N={points.shape[1]} points')
    with torch.no_grad():
        return (_neighbours_op if _compiling() else _neighbours)(query.detach(), points.detach(), k, backend)


def _neighbours(query: Tensor, points: Tensor, k: int, backend: str) -> Tensor:
    if _tracing():
        return _neighbours_functional(query, points, k)
    module = backends.pytorch3d_for(backend, query, points)
    if module is not None:
        return backends.neighbours(module, query, points, k)
    if points.device.type != 'cpu':
        return _by_topk(query, points, k)
    large = points.shape[1] >= TREE_POINTS and query.shape[1] >= TREE_QUERIES
    return search_clouds(_search_tree if large and tree_class() is not None else _search_pairs, query, points, k)


def _index_mask(N: int) -> int:
    return (1 << max(N - 1, 1).bit_length()) - 1


def _ranked_keys(query: Tensor, points: Tensor) -> Tensor:
    """:func:`_keys` of every query and every point, ``(..., M, N)``."""
    N = points.shape[-2]
    return _keys(query.unsqueeze(-2), points.unsqueeze(-3), torch.arange(N, device=points.device), N)


def _keys(query: Tensor, points: Tensor, index: Tensor, N: int) -> Tensor:
    """Integers that sort by distance, then by index, which is below ``N``.

    Non-negative doubles sort like their bit patterns; the index replaces the lowest bits.
    """
    axes = [(query[..., i].double(), points[..., i].double()) for i in range(3)]
    distance = (axes[0][0] - axes[0][1]).square_()
    term = torch.empty_like(distance)
    for q, p in axes[1:]:
        distance.add_(torch.sub(q, p, out=term).square_())
    return distance.view(torch.int64).bitwise_and_(~_index_mask(N)).bitwise_or_(index)


def _by_topk(query: Tensor, points: Tensor, k: int) -> Tensor:
    """Neighbours in all clouds, comparing every pair, as many queries at a time as ``DEVICE_CHUNK`` allows."""
    B, N, _ = points.shape
    parts = query.split(max(1, DEVICE_CHUNK // max(1, B * N)), 1)
    found = [_ranked_keys(part, points).topk(k, dim=-1, largest=False)[0] for part in parts]
    return torch.cat(found, 1) & _index_mask(N)


def _neighbours_functional(query: Tensor, points: Tensor, k: int) -> Tensor:
    """The same for ``torch.export``, in arithmetic alone: other runtimes have no bit patterns of floats, and break ties
    in ways of their own.

    Distances are rounded to 32 bits (Dekker's splitting), and those of the points ``0, 1, 2, …`` raised by so many
    units in the last of 53 places, as many as 2^20 points leave room for: none are equal then.
    """
    x, y, z = ((query[..., i].double().unsqueeze(-1) - points[..., i].double().unsqueeze(-2)).square()
               for i in range(3))
    distance = (x + y + z).clamp(min=1e-280)  # (B, M, N)
    upper = distance * (2**21 + 1)
    rounded = upper - (upper - distance)
    index = torch.arange(points.shape[1], device=points.device)
    return (rounded * ((index.double() + 2**52) / 2**52)).topk(k, dim=-1, largest=False)[1]


@functools.cache
def tree_class():
    """scipy's k-d tree, or ``None``."""
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        return None
    return cKDTree


def search_clouds(search, query: Tensor, points: Tensor, k: int) -> Tensor:
    """``search(query, points, found, workers=...)`` for every cloud, in float64, on as many threads as torch uses: one
    cloud each, or, where there is one cloud, some of its queries each. Returns the indices found, ``(B, M, k)``."""
    threads = torch.get_num_threads()
    found = np.empty((*query.shape[:2], k), np.int64)
    search = functools.partial(search, workers=threads if len(points) == 1 else 1)
    work = zip(query.double().numpy(), points.double().numpy(), found)
    _on_threads(lambda cloud: search(*cloud), list(work), threads)
    return torch.from_numpy(found)


def _on_threads(function, items: Sequence, threads: int) -> None:
    """``function`` of each of ``items``. (Work in numpy: torch's own threads would multiply with these.)"""
    if threads > 1 and len(items) > 1:
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            list(pool.map(function, items))
    else:
        for item in items:
            function(item)


def _search_tree(query: np.ndarray, points: np.ndarray, found: np.ndarray, workers: int) -> None:
    """Neighbours in one cloud, into ``found`` ``(M, k)``. A tree breaks ties as it likes, so its candidates are ranked
    again, and queries whose last neighbour ties with the next one are compared with every point."""
    k, mask = found.shape[1], _index_mask(len(points))
    candidates = min(k + 1, len(points))
    tree = tree_class()(points, leafsize=LEAF, balanced_tree=False, compact_nodes=False)
    axes = points.T.copy()
    rows = max(1, CHUNK // candidates)
    for start in range(0, len(query), rows):
        part = query[start:start + rows]
        idx = tree.query(part, k=candidates, workers=workers)[1].reshape(-1, candidates)
        distance = np.zeros(idx.shape)
        for axis, coordinate in zip(axes, part.T):
            distance += np.square(axis.take(idx) - coordinate[:, None])
        keys = (distance.view(np.int64) & ~mask) | idx
        keys.sort(-1)
        if candidates > k:
            tied = np.flatnonzero((keys[:, k - 1] | mask) == (keys[:, k] | mask))
            if len(tied):
                found_again = np.empty((len(tied), k), np.int64)
                _search_pairs(part[tied], points, found_again)
                keys[tied, :k] = found_again
        np.bitwise_and(keys[:, :k], mask, out=found[start:start + rows])


def _search_pairs(query: np.ndarray, points: np.ndarray, found: np.ndarray, workers: int = 1) -> None:
    """Neighbours in one cloud, into ``found`` ``(M, k)``, comparing every pair, as many queries at a time as fit the
    cache."""
    N, k = len(points), found.shape[1]
    mask, index, axes = _index_mask(N), np.arange(N), points.T.copy()
    rows = max(1, CHUNK // N)

    @np.errstate(over='ignore')
    def search(start: int) -> None:
        part = query[start:start + rows].T[..., None]
        distance = part[0] - axes[0]
        np.square(distance, out=distance)
        term = np.empty_like(distance)
        for coordinate, axis in zip(part[1:], axes[1:]):
            np.subtract(coordinate, axis, out=term)
            distance += np.square(term, out=term)
        keys = distance.view(np.int64)
        keys &= ~mask
        keys |= index
        if k < N:
            keys.partition(k - 1, axis=-1)
        np.bitwise_and(np.sort(keys[:, :k], axis=-1), mask, out=found[start:start + rows])

    _on_threads(search, range(0, len(query), rows), workers)


def gather(points: Tensor, idx: Tensor) -> Tensor:
    """``points[b, idx[b, ...]]`` for every cloud ``b``.

    Shape:
        - points ``(B, N, C)``, idx ``(B, ...)`` int64; returns ``(B, ..., C)``.

    Raises:
        ValueError: shapes that do not fit.
    """
    if points.ndim != 3 or idx.ndim < 2 or points.shape[0] != idx.shape[0]:
        raise ValueError(f'gather: points (B, N, C) and idx (B, ...) expected, got {tuple(points.shape)} and '
                         f'{tuple(idx.shape)}')
    B, N, C = points.shape
    rows = idx + torch.arange(B, device=idx.device).mul(N).view(-1, *[1] * (idx.ndim - 1))
    return points.reshape(B * N, C).index_select(0, rows.flatten()).view(*idx.shape, C)


def _single(points: Tensor) -> Tensor:
    return points.float() if points.dtype in (torch.float16, torch.bfloat16) else points


def _tracing() -> bool:
    """Whether values must not be looked at: inside ``torch.compile`` or ``torch.export``."""
    return torch.compiler.is_compiling()


def _compiling() -> bool:
    """Whether the operator should stay one opaque node: in ``torch.compile``, but not in ``torch.export``, whose graph
    should need torch alone."""
    return _tracing() and not exporting()


def exporting() -> bool:
    """Whether ``torch.export`` is at work, for any runtime."""
    return getattr(torch.compiler, 'is_exporting', lambda: False)()


@torch.library.custom_op('ewa3d::neighbours', mutates_args=())
def _neighbours_op(query: Tensor, points: Tensor, k: int, backend: str) -> Tensor:
    return _neighbours(query, points, k, backend)


@_neighbours_op.register_fake
def _(query, points, k, backend):
    return query.new_empty(*query.shape[:2], k, dtype=torch.int64)
