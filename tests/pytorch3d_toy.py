"""What tests take for pytorch3d.ops where it is not installed: its signatures and conventions (0.7.8), in slow loops.

Single precision only, like its compiled functions. Of equal distances the last point counts as the nearer one: on a GPU
their order is anybody's.
"""
from types import ModuleType
from typing import NamedTuple

import torch


class _KNN(NamedTuple):
    dists: torch.Tensor
    idx: torch.Tensor
    knn: torch.Tensor | None


def sample_farthest_points(points, lengths=None, K=50, random_start_point=False):
    batch, size = points.shape[:2]
    assert points.dtype == torch.float32 and not random_start_point
    lengths = torch.full((batch,), size) if lengths is None else lengths
    assert lengths.shape == (batch,) and lengths.dtype == torch.int64 and int(lengths.max()) <= size
    wanted = torch.full((batch,), K) if isinstance(K, int) else torch.as_tensor(K)
    picked = torch.full((batch, int(wanted.max())), -1)
    for cloud, row, length, number in zip(points, picked, lengths.tolist(), wanted.tolist()):
        nearest = torch.full((length,), torch.finfo(torch.float32).max)
        last = 0
        row[0] = last
        for i in range(1, min(length, number)):
            x, y, z = (cloud[:length] - cloud[last]).square().unbind(1)
            nearest = torch.minimum(nearest, x + y + z)
            last = int(nearest.argmax())
            row[i] = last
    return torch.stack([cloud[row.clamp(min=0)] * (row >= 0)[:, None] for cloud, row in zip(points, picked)]), picked


def knn_points(p1, p2, lengths1=None, lengths2=None, norm=2, K=1, version=-1, return_nn=False, return_sorted=True):
    x, y, z = _differences(p1, p2).square().unbind(-1)
    assert norm == 2 and return_sorted and lengths1 is lengths2 is None and 1 <= K <= p2.shape[1]
    dists, idx = (x + y + z).flip(-1).sort(dim=-1, stable=True)
    idx = p2.shape[1] - 1 - idx[..., :K]
    return _KNN(dists[..., :K], idx, p2[torch.arange(len(p2))[:, None, None], idx] if return_nn else None)


def ball_query(p1, p2, lengths1=None, lengths2=None, K=500, radius=0.2, return_nn=True, skip_points_outside_cube=False):
    x, y, z = _differences(p1, p2).square().unbind(-1)
    assert lengths1 is lengths2 is None
    dists, idx = torch.zeros(*p1.shape[:2], K), torch.full((*p1.shape[:2], K), -1)
    for hits, distance, found in zip((x + y + z).flatten(0, 1), dists.flatten(0, 1), idx.flatten(0, 1)):
        inside = (hits < torch.tensor(radius) ** 2).nonzero().flatten()[:K]
        distance[:len(inside)], found[:len(inside)] = hits[inside], inside
    nn = p2[torch.arange(len(p2))[:, None, None], idx.clamp(min=0)] * (idx >= 0)[..., None] if return_nn else None
    return _KNN(dists, idx, nn)


def _differences(p1, p2):
    assert p1.dtype == p2.dtype == torch.float32 and p1.shape[0] == p2.shape[0] and p1.shape[2] == p2.shape[2]
    return p1.unsqueeze(2) - p2.unsqueeze(1)


def modules() -> dict[str, ModuleType]:
    """What belongs into ``sys.modules``."""
    package, ops = ModuleType('pytorch3d'), ModuleType('pytorch3d.ops')
    for function in (sample_farthest_points, knn_points, ball_query):
        setattr(ops, function.__name__, function)
    package.ops, package.__version__ = ops, '0.0.toy'
    return {'pytorch3d': package, 'pytorch3d.ops': ops}
