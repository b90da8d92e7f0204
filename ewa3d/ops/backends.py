"""Operators of pytorch3d behind the functions of this package.

Every operator takes ``backend='auto' | 'torch' | 'pytorch3d'``. ``'torch'`` is this package's own code (torch, and on a
CPU numpy, scipy and numba where they are installed); ``'auto'`` takes what the environment variable ``EWA3D_BACKEND``
names, and where there is none pytorch3d on CUDA devices, where it is installed, and ``'torch'`` elsewhere. A graph that
is exported needs torch alone whatever the backend.

Results are those of ``'torch'``. Where conventions differ they are translated here: the start and the points left out
of farthest point sampling, ties, padding. pytorch3d computes in single precision, so double precision stays with torch
(``'pytorch3d'`` by name refuses it). What cannot be made equal is rounding: a GPU fuses products and sums, and two
points whose distances agree to the last bit or two of single precision may change places in farthest point sampling,
or at the edge of a ball.
"""
import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from ewa3d.registry import nearest as nearest_names

__all__ = ['BACKENDS', 'VARIABLE', 'check_backend', 'pytorch3d_for']

BACKENDS = ('auto', 'torch', 'pytorch3d')
VARIABLE = 'EWA3D_BACKEND'
ROUNDING = 2**-19  # relative, of a squared distance in single precision, and to spare
SMALL, LARGE = 1e-30, 1e38  # outside of these a squared distance in single precision has lost digits


def check_backend(name: str, what: str) -> str:
    """``name``, if it is one of ``BACKENDS``.

    Raises:
        ValueError: it is none; the message says what gave it.
    """
    if name not in BACKENDS:
        raise ValueError(f'{what}={name!r}; {nearest_names(str(name), BACKENDS)}')
    return name


def pytorch3d_for(backend: str, *points: Tensor) -> ModuleType | None:
    """``pytorch3d.ops`` where it is to work on these points, else ``None``.

    Shape:
        - points: of any shape; their device and dtype decide.

    Raises:
        ValueError: a backend that does not exist, or pytorch3d by name and double precision.
        ImportError: pytorch3d by name, and it is not installed.
    """
    check_backend(backend, 'backend')
    if backend == 'auto':
        backend = check_backend(os.environ.get(VARIABLE) or 'auto', f'the environment variable {VARIABLE}')
    double = any(p.dtype == torch.float64 for p in points)
    if backend == 'torch' or (backend == 'auto' and (double or points[0].device.type != 'cuda')):
        return None
    try:
        module = importlib.import_module('pytorch3d.ops')
    except ImportError as error:
        if backend == 'auto':
            return None
        raise ImportError("backend='pytorch3d' needs pytorch3d, which cannot be imported here "
                          f"({error}): install it as its documentation says, or leave it to backend='auto'") from error
    if double:
        raise ValueError("backend='pytorch3d' computes in single precision and was given float64: take "
                         "backend='torch' or 'auto', or pass float32")
    return module


def fps(module: ModuleType, points: Tensor, num: int, start: Tensor, taking_part: Tensor) -> Tensor:
    """Farthest point sampling from any start among the points that take part ``(B, N)``: ``sample_farthest_points``
    begins with a cloud's first point and takes its first ``lengths`` points."""
    rows = torch.arange(points.shape[1], device=points.device)
    is_start = rows == start.unsqueeze(1)
    place = (~taking_part).long().masked_fill(is_start, -1)  # the start, those that take part, the rest
    order = place.argsort(dim=1, stable=True)
    lengths = (taking_part | is_start).sum(1)
    ordered = points.float().gather(1, order.unsqueeze(-1).expand(-1, -1, 3))
    picks = module.sample_farthest_points(ordered, lengths=lengths, K=num)[1]
    found = order.gather(1, picks.clamp(min=0))
    lowest = taking_part.long().argmax(1, keepdim=True)  # is picked on and on when no point at a distance is left
    return torch.where((picks < 0) | _repeated(picks), lowest, found)


def _repeated(picks: Tensor) -> Tensor:
    """Which entries of a row stand there before, too."""
    ordered, order = picks.sort(dim=1, stable=True)
    again = torch.zeros_like(picks, dtype=torch.bool)
    again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return torch.zeros_like(again).scatter(1, order, again)


def neighbours(module: ModuleType, query: Tensor, points: Tensor, k: int) -> Tensor:
    """Nearest neighbours in the order of their distances in double precision: those that are found are ranked again,
    and where single precision cannot tell which ones they are the query is compared with every point."""
    from ewa3d.ops.points import _by_topk, _index_mask, _keys, gather
    N, mask = points.shape[1], _index_mask(points.shape[1])
    candidates = min(k + 1, N)
    idx = module.knn_points(query.float(), points.float(), K=candidates)[1]
    keys = _keys(query.unsqueeze(2), gather(points, idx), idx, N).sort(-1)[0]
    found = keys[..., :k] & mask
    if candidates > k:
        last, beyond = keys[..., k - 1].view(torch.float64), keys[..., k].view(torch.float64)
        unsure = (last >= beyond * (1 - ROUNDING) - SMALL) | (beyond > LARGE)
        for b in unsure.any(1).nonzero().flatten().tolist():
            found[b, unsure[b]] = _by_topk(query[b:b + 1, unsure[b]], points[b:b + 1], k)[0]
    return found


def ball_query(module: ModuleType, query: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """The first ``k`` points in each ball: places without one hold -1 there, here the first, or 0 in an empty ball."""
    idx = module.ball_query(query.float(), points.float(), K=k, radius=radius, return_nn=False)[1]
    return torch.where(idx < 0, idx[..., :1].clamp(min=0), idx)


def nearest(module: ModuleType, x: Tensor, y: Tensor) -> Tensor:
    """``(B, N)``: the index of a nearest point of ``y`` for each of ``x``."""
    return module.knn_points(x.float(), y.float(), K=1)[1].squeeze(-1)
