"""Farthest point sampling."""
import torch
from torch import Tensor

from ewa3d.checks import check_integer
from ewa3d.ops import backends, blocks
from ewa3d.ops.points import _compiling, _single, _tracing, check_points

__all__ = ['fps']

ORIGIN_RADIUS2 = 1e-3  # the published kernels never pick a point with a squared norm up to this


def fps(points: Tensor, num: int, start: int | Tensor = 0, skip_origin: bool = False,
        lengths: Tensor | None = None, backend: str = 'auto') -> Tensor:
    """Farthest point sampling: each pick is the point farthest from all picks before it.

    The picks have the prefix property: the first ``m`` of them are the picks for ``num=m``. Equal distances go to the
    lowest index. Distances are computed in the dtype of ``points`` (half precision: in float32).

    Args:
        num: how many points to pick, at most ``N``.
        start: index of the first pick, one for all clouds or ``(B,)``.
        skip_origin: after the start, ignore points with a squared norm of at most 1e-3, as the CUDA kernel of
            Pointnet2_PyTorch does, which Point-MAE and Point-BERT were trained with. Where no other point is left,
            index 0 is picked again, as there.
        lengths: ``(B,)`` points that count in each cloud; the rest is padding.
        backend: ``'auto'``, ``'torch'`` or ``'pytorch3d'`` (:mod:`ewa3d.ops.backends`).

    Shape:
        - points: ``(B, N, 3)``; returns ``(B, num)`` int64.

    Raises:
        ValueError: fewer points than ``num``, an impossible ``start``, no cloud, coordinates that are not finite, a
            backend that does not exist or cannot do it. ImportError: a backend that is not installed.
        TypeError: ``num`` or ``start`` is no integer.
    """
    check_points(points)
    B, N, _ = points.shape
    if not _tracing():
        num = check_integer('fps: num', num, 1)
        if not B:
            raise ValueError('fps: the batch is empty (B=0)')
    if not 1 <= num <= N:
        raise ValueError(f'fps: num={num} points cannot be picked from N={N}')
    if lengths is not None:
        lengths = torch.as_tensor(lengths, device=points.device)
        if lengths.shape != (B,):
            raise ValueError(f'fps: lengths must have the shape ({B},), got {tuple(lengths.shape)}')
        if not _tracing() and (lengths.min() < num or lengths.max() > N):
            raise ValueError(f'fps: lengths must lie between num={num} and N={N}, got {lengths.tolist()}')
    start = _starts(start, B, N, points.device)
    with torch.no_grad():
        points = _single(points.detach())
        if skip_origin:
            taking_part = points.double().square().sum(-1) > ORIGIN_RADIUS2
        else:
            taking_part = torch.ones(B, N, dtype=torch.bool, device=points.device)
        if lengths is not None:
            taking_part &= torch.arange(N, device=points.device) < lengths.unsqueeze(1)
        nearest = points.new_full((B, N), float('inf')).masked_fill_(~taking_part, -float('inf'))
        if _tracing() and not _compiling():
            return _fps_functional(points, num, start, nearest)
        return (_fps_op if _compiling() else _fps)(points, num, start, nearest, backend)


def _starts(start: int | Tensor, B: int, N: int, device: torch.device) -> Tensor:
    """The index of the first pick in each cloud ``(B,)``; its values are looked at on a CPU only."""
    if not isinstance(start, Tensor):
        if check_integer('fps: start', start, 0) >= N:
            raise ValueError(f'fps: start={start} is not an index into N={N} points')
        return torch.full((B,), start, dtype=torch.int64, device=device)
    if start.shape != (B,):
        raise ValueError(f'fps: start must be one index or have the shape ({B},), got {tuple(start.shape)}')
    if start.is_floating_point() or start.dtype == torch.bool:
        raise TypeError(f'fps: start must hold integers, got {start.dtype}')
    if start.device.type == 'cpu' and not _tracing() and bool(((start < 0) | (start >= N)).any()):
        raise ValueError(f'fps: start={start.tolist()} are not all indices into N={N} points')
    return start.to(device, torch.int64)


def _fps(points: Tensor, num: int, start: Tensor, nearest: Tensor, backend: str) -> Tensor:
    """The picks of :func:`fps`; ``nearest`` is ``(B, N)``, inf, and -inf for points that take no part."""
    module = backends.pytorch3d_for(backend, points)
    if module is not None:
        return backends.fps(module, points, num, start, nearest > 0)
    kernel = blocks.compiled() if nearest.device.type == 'cpu' else None
    return _fps_loop(points, num, start, nearest) if kernel is None else \
        blocks.sample(kernel, points, num, start, nearest)


def _fps_loop(points: Tensor, num: int, start: Tensor, nearest: Tensor) -> Tensor:
    """In place on contiguous x, y, z, updating the squared distances to the picks so far.

    Products and sums are separate operations: fused ones round differently in the vectorised part of a row and in
    its rest, and then equal points would not have equal distances.
    """
    axes = [points[..., i].contiguous() for i in range(3)]
    nearest = nearest.clone()
    distance, term = torch.empty_like(nearest), torch.empty_like(nearest)
    as_numpy = nearest.numpy() if nearest.device.type == 'cpu' else None
    picks = torch.empty(len(points), num, dtype=torch.int64, device=points.device)
    pick = start.unsqueeze(1)
    for i in range(num):
        if i:
            pick = nearest.argmax(1, keepdim=True) if as_numpy is None else \
                torch.from_numpy(as_numpy.argmax(1)).unsqueeze(1)
        picks[:, i:i + 1] = pick
        torch.sub(axes[0], axes[0].gather(1, pick), out=distance)
        distance.mul_(distance)
        for axis in axes[1:]:
            torch.sub(axis, axis.gather(1, pick), out=term)
            distance.add_(term.mul_(term))
        torch.minimum(nearest, distance, out=nearest)
    return picks


def _fps_functional(points: Tensor, num: int, start: Tensor, nearest: Tensor) -> Tensor:
    """:func:`_fps` without side effects, for ``torch.export``: a loop in the graph, of any length in the same size."""
    from torch._higher_order_ops.scan import scan
    x, y, z = (axis.contiguous() for axis in points.unbind(-1))

    def step(carry: tuple[Tensor, Tensor], _: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        nearest, pick = carry
        distance = (x - x.gather(1, pick)).square() + (y - y.gather(1, pick)).square() + \
            (z - z.gather(1, pick)).square()
        nearest = torch.minimum(nearest, distance)
        return (nearest, nearest.argmax(1, keepdim=True)), pick.squeeze(1).clone()

    _, picks = scan(step, (nearest, start.unsqueeze(1)), torch.arange(num, device=points.device))
    return picks.transpose(0, 1)


@torch.library.custom_op('ewa3d::fps', mutates_args=())
def _fps_op(points: Tensor, num: int, start: Tensor, nearest: Tensor, backend: str) -> Tensor:
    return _fps(points, num, start, nearest, backend)


@_fps_op.register_fake
def _(points, num, start, nearest, backend):
    return points.new_empty(points.shape[0], num, dtype=torch.int64)
