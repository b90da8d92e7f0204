"""Farthest point sampling in compiled loops, where numba is installed: the same picks, several times faster.

A cloud is cut into blocks of points, each with its box. A pick changes nothing in a block whose box is farther from it
than the block's points are from the picks before, so in a large cloud, whose blocks hold points that lie together, most
of them are passed over. That is exact: rounding never turns an order around, and the distance to a box, formed by the
same operations as that to a point, is at most the one to any point in it. No tolerance is needed, and no operations are
fused or reordered.

(Nearest neighbours in such loops were no faster than scipy's trees.)
"""
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

__all__ = ['compiled', 'sample']

LENGTH = 256  # points of a block
SPREAD = np.array([sum((i >> j & 1) << 3 * j for j in range(5)) for i in range(32)], np.uint16)  # two bits between bits
SORTED = 1 << 23  # from this many distances a cloud on, sorting its points into blocks costs less than it saves


@functools.cache
def compiled() -> Callable | None:
    """:func:`farthest` compiled by numba, or ``None`` without it. The machine code is kept on disk where that can be
    written."""
    try:
        from numba import njit
    except ImportError:
        return None
    try:
        return njit(nogil=True, cache=True)(farthest)
    except RuntimeError:  # no folder to keep it in
        return njit(nogil=True)(farthest)


def sample(kernel: Callable, points: Tensor, num: int, start: Tensor, nearest: Tensor) -> Tensor:
    """``num`` picks of each cloud, ``(B, num)``.

    Args:
        kernel: :func:`farthest`, compiled.
        nearest: ``(B, N)``, inf; -inf for points that take no part.
    """
    B, N = nearest.shape
    points, nearest, start = points.numpy(), nearest.numpy(), start.numpy()
    picks = np.empty((B, num), np.int64)

    def work(rows: slice) -> None:
        axes, ids = in_blocks(points[rows], num * N >= SORTED)
        near = np.take_along_axis(nearest[rows], ids, 1)
        kernel(axes, near, near.view(f'i{near.itemsize}'), ids, start[rows], LENGTH, picks[rows])

    on_threads(work, B)
    return torch.from_numpy(picks)


def on_threads(work: Callable[[slice], None], size: int) -> None:
    """``work(slice)`` of all of ``size`` things, on as many threads as torch uses, some of the things each."""
    threads = min(torch.get_num_threads(), size)
    bounds = [size * i // max(threads, 1) for i in range(threads + 1)]
    if threads <= 1:
        work(slice(None))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, map(slice, bounds, bounds[1:])))


def in_blocks(points: np.ndarray, together: bool) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates ``(B, 3, N)`` one block after another and which points these are, ``(B, N)``, ascending in a block:
    as they come, or such that those of a block lie ``together``."""
    B, N, _ = points.shape
    if not together or N <= LENGTH:
        return np.ascontiguousarray(points.transpose(0, 2, 1)), np.broadcast_to(np.arange(N), (B, N)).copy()
    ids = np.stack([along_curve(cloud) for cloud in points])
    return np.stack([cloud.T[:, rows] for cloud, rows in zip(points, ids)]), ids


def along_curve(points: np.ndarray) -> np.ndarray:
    """The rows of a cloud in an order in which those of a block lie together: along a z-order curve through a grid of
    32³ cells. The rows of a block are in order. (A cloud of which most lies in one cell is slower, nothing else.)"""
    points = points.astype(np.float64)
    low = points.min(0)
    with np.errstate(all='ignore'):  # no extent, or one out of range
        cells = ((points - low) * (31.99 / (points.max(0) - low))).astype(np.int64) & 31
    x, y, z = SPREAD[cells.T]
    order = (x | y << 1 | z << 2).argsort(kind='stable')  # of 16-bit integers: in a few passes
    whole = len(order) // LENGTH * LENGTH
    order[:whole].reshape(-1, LENGTH).sort()
    order[whole:].sort()
    return order


def farthest(axes, nearest, bits, ids, start, length, picks):
    """Fill ``picks`` ``(B, num)``. Plain Python that numba compiles: loops over numbers.

    Args:
        axes: coordinates ``(B, 3, N)``, blocks of ``length`` points one after another.
        nearest: ``(B, N)``, as :func:`sample` says; changed.
        bits: the same memory as integers of that size: what is never negative but for -inf is in the same order, and
            the largest integer of a block is found by vector instructions.
        ids: ``(B, N)``, which points these are, ascending within a block.
        start: ``(B,)``, the first pick.
    """
    N = axes.shape[2]
    blocks = (N + length - 1) // length
    boxes = np.empty((blocks, 6), axes.dtype)
    top = np.empty(blocks, np.int64)  # the farthest point of each block, the first of them
    for b in range(len(axes)):
        x, y, z = axes[b, 0], axes[b, 1], axes[b, 2]
        at = 0
        while ids[b, at] != start[b]:
            at += 1
        for i in range(blocks):
            first = i * length
            last = min(N, first + length)
            for a in range(3):
                boxes[i, a] = axes[b, a, first:last].min()
                boxes[i, 3 + a] = axes[b, a, first:last].max()
            top[i] = first
            for j in range(first, last):
                if nearest[b, j] > nearest[b, top[i]]:
                    top[i] = j
        for n in range(picks.shape[1]):
            if n > 0:
                at = top[0]
                for j in top:
                    if nearest[b, j] > nearest[b, at] or (nearest[b, j] == nearest[b, at] and ids[b, j] < ids[b, at]):
                        at = j
            picks[b, n] = ids[b, at]
            px, py, pz = x[at], y[at], z[at]
            for i in range(blocks):
                dx = max(boxes[i, 0] - px, px - boxes[i, 3], px - px)
                dy = max(boxes[i, 1] - py, py - boxes[i, 4], py - py)
                dz = max(boxes[i, 2] - pz, pz - boxes[i, 5], pz - pz)
                if dx * dx + dy * dy + dz * dz >= nearest[b, top[i]]:
                    continue
                first = i * length
                last = min(N, first + length)
                xs, ys, zs = x[first:last], y[first:last], z[first:last]
                near, rank = nearest[b, first:last], bits[b, first:last]
                for j in range(len(near)):
                    dx, dy, dz = xs[j] - px, ys[j] - py, zs[j] - pz
                    distance = dx * dx + dy * dy + dz * dz
                    near[j] = distance if distance < near[j] else near[j]
                largest = rank[0]
                for j in range(len(rank)):
                    largest = max(largest, rank[j])
                j = 0
                while rank[j] != largest:
                    j += 1
                top[i] = first + j
