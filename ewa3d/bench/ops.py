"""Operators on points and boxes and attention against plain torch forms of the same thing, and against pytorch3d."""
import importlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from ewa3d.bench import boxes
from ewa3d.bench.detection import room
from ewa3d.bench.harness import DTYPES, Case, Settings

__all__ = ['cases']

FPS_SIZES = ((32, 1024, 64), (32, 2048, 128), (8, 8192, 512), (1, 40_000, 2048),
             (1, 100_000, 2048))  # batch, points, samples
KNN_SIZES = ((32, 1024, 64, 32), (32, 2048, 128, 32), (8, 8192, 512, 32), (1, 100_000, 2048, 32))  # …, queries, k
BALL_SIZES = ((1, 20_000, 2048, 0.2, 64), (1, 40_000, 2048, 0.2, 64), (1, 2048, 1024, 0.4, 32))  # …, radius, k
CHAMFER_SIZES = ((1216, 32), (32, 1024), (32, 2048), (8, 8192))  # clouds or patches, points
ATTENTION_SIZES = ((32, 6, 65, 64), (32, 6, 129, 64), (8, 6, 513, 64))  # batch, heads, tokens, channels of a head
QUICK_FPS, QUICK_KNN, QUICK_ATTENTION = ((2, 64, 8),), ((2, 64, 8, 4),), ((2, 2, 5, 4),)
QUICK_BALL = ((1, 90, 8, 1., 4),)
POINTWISE_SIZES = ((1024, 32, 256, 512), (1024, 32, 512, 384))  # patches, points, channels in and out
QUICK_CHAMFER, QUICK_POINTWISE = ((6, 8), (2, 600)), ((3, 4, 5, 6),)


def cases(settings: Settings) -> Iterator[Case]:
    """FPS, kNN, ball query, boxes, and, forward and backward, Chamfer and linear maps of patches: in float32 whatever
    dtype. Attention, forward and backward, by dtype."""
    from ewa3d import ops
    from ewa3d.layers.block import attend, pointwise
    missing = _missing('pytorch3d.ops')
    for batch, points, samples in QUICK_FPS if settings.quick else FPS_SIZES:
        cloud = _clouds(batch, points, settings)
        yield Case(f'fps {batch}×{points}→{samples}', **_and_pytorch3d(missing, {
            'mask assign': _bound(fps_mask_assign, cloud, samples),
            'x, y, z apart, in place': _bound(fps_in_place, cloud, samples),
            'ewa3d': _bound(ops.fps, cloud, samples)}, _bound(partial(ops.fps, backend='pytorch3d'), cloud, samples)))
    for batch, points, queries, k in QUICK_KNN if settings.quick else KNN_SIZES:
        cloud = _clouds(batch, points, settings)
        centres = cloud[:, :queries].contiguous()
        yield Case(f'knn {batch}×{points}, {queries} queries, k={k}', **_and_pytorch3d(missing, {
            'cdist + topk': _bound(knn_cdist, centres, cloud, k),
            'centred product + topk': _bound(knn_centred_product, centres, cloud, k),
            'k-d trees': _bound(knn_trees, centres, cloud, k),
            'ewa3d': _bound(ops.knn, centres, cloud, k)},
            _bound(partial(ops.knn, backend='pytorch3d'), centres, cloud, k)))
    for batch, points, queries, radius, k in QUICK_BALL if settings.quick else BALL_SIZES:
        cloud = room(points, settings).expand(batch, -1, -1)
        centres = cloud[:, :queries].contiguous()
        name = f'ball query {batch}×{points}, {queries} queries, radius {radius}, k={k}'
        yield Case(name, **_and_pytorch3d(missing, {
            'all pairs + topk': _bound(ball_query_topk, centres, cloud, radius, k),
            'ewa3d': _bound(ops.ball_query, centres, cloud, radius, k)},
            _bound(partial(ops.ball_query, backend='pytorch3d'), centres, cloud, radius, k)))
    for count, points in QUICK_CHAMFER if settings.quick else CHAMFER_SIZES:
        shapes = ((count, points, 3),) * 2
        yield Case(f'chamfer {count}×{points}', **_and_pytorch3d(missing, {
            'cdist, full graph': _trained(chamfer_cdist, shapes, 'fp32', settings),
            'argmin + gather': _trained(partial(chamfer_gather, nearest_argmin), shapes, 'fp32', settings),
            'k-d trees + gather': _trained(partial(chamfer_gather, nearest_trees), shapes, 'fp32', settings),
            'ewa3d': _trained(ops.chamfer_distance, shapes, 'fp32', settings)},
            _trained(partial(ops.chamfer_distance, backend='pytorch3d'), shapes, 'fp32', settings)))
    for patches, points, channels, out in QUICK_POINTWISE if settings.quick else POINTWISE_SIZES:
        shapes = (patches, points, channels), (out, channels)
        yield Case(f'pointwise {patches}×{points}, {channels}→{out}', {
            'linear': _trained(linear, shapes, 'fp32', settings),
            'ewa3d': _trained(pointwise, shapes, 'fp32', settings)})
    yield from boxes.cases(settings)
    for dtype in settings.dtypes:
        for shape in QUICK_ATTENTION if settings.quick else ATTENTION_SIZES:
            yield Case(f'attention {"×".join(map(str, shape))}, {dtype}', {
                'scaled_dot_product_attention': _trained(scaled_dot_product_attention, (shape,) * 3, dtype, settings),
                'ewa3d': _trained(attend, (shape,) * 3, dtype, settings)})


def _missing(module: str) -> str:
    """Why a module cannot be imported, or nothing."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return str(error)
    return ''


def _and_pytorch3d(missing: str, variants: dict, builder) -> dict:
    """What a :class:`Case` is made of, with pytorch3d behind the same function where it is not ``missing``."""
    if missing:
        return dict(variants=variants, memory=True, skipped={'pytorch3d': missing})
    return dict(variants={**variants, 'pytorch3d': builder}, memory=True)


def fps_mask_assign(points: Tensor, num: int) -> Tensor:
    """Farthest point sampling the way it is usually written: update the nearest distances through a boolean mask.

    Shape:
        - points: ``(B, N, 3)``. Returns indices ``(B, num)``.
    """
    batch, count, _ = points.shape
    rows = torch.arange(batch, device=points.device)
    chosen = torch.zeros(batch, num, dtype=torch.long, device=points.device)
    nearest = points.new_full((batch, count), float('inf'))
    last = torch.zeros(batch, dtype=torch.long, device=points.device)
    for i in range(num):
        chosen[:, i] = last
        distance = (points - points[rows, last][:, None]).square().sum(-1)
        closer = distance < nearest
        nearest[closer] = distance[closer]
        last = nearest.argmax(-1)
    return chosen


def fps_in_place(points: Tensor, num: int) -> Tensor:
    """Farthest point sampling on x, y, z of their own, every step in the same memory."""
    x, y, z = (points[..., i].contiguous() for i in range(3))
    nearest, distance, term = torch.full_like(x, float('inf')), torch.empty_like(x), torch.empty_like(x)
    chosen = torch.zeros(len(points), num, dtype=torch.long, device=points.device)
    last = chosen[:, :1]
    for i in range(num):
        chosen[:, i:i + 1] = last
        torch.sub(x, x.gather(1, last), out=distance).square_()
        distance += torch.sub(y, y.gather(1, last), out=term).square_()
        distance += torch.sub(z, z.gather(1, last), out=term).square_()
        torch.minimum(nearest, distance, out=nearest)
        last = nearest.argmax(1, keepdim=True)
    return chosen


def knn_cdist(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k nearest neighbours from all differences (exact far from the origin): distances and indices ``(B, M, k)``."""
    return torch.cdist(query, points, compute_mode='donot_use_mm_for_euclid_dist').topk(k, largest=False)


def knn_centred_product(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k nearest neighbours from one matrix product of the centred coordinates: squared distances and indices."""
    centre = points.mean(1, keepdim=True)
    query, points = query - centre, points - centre
    squares = points.square().sum(-1)[:, None]  # (B, 1, N): |q|² shifts a whole row and cannot change its order
    near, index = torch.baddbmm(squares, query, points.transpose(1, 2), alpha=-2).topk(k, largest=False)
    return near + query.square().sum(-1, keepdim=True), index


def knn_trees(query: Tensor, points: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k nearest neighbours by scipy's k-d trees, clouds on threads; ties as the tree takes them. On a CPU."""
    from scipy.spatial import cKDTree

    def search(one: np.ndarray, cloud: np.ndarray):
        workers = torch.get_num_threads() if len(points) == 1 else 1
        return cKDTree(cloud, balanced_tree=False, compact_nodes=False).query(one, k=range(1, k + 1), workers=workers)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        distance, index = zip(*pool.map(search, query.cpu().numpy(), points.cpu().numpy()))
    return torch.from_numpy(np.stack(distance)).to(query) ** 2, torch.from_numpy(np.stack(index)).to(query.device)


def ball_query_topk(query: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """The first ``k`` points of each ball the way it is usually written: the smallest indices of those inside."""
    outside = torch.cdist(query, points, compute_mode='donot_use_mm_for_euclid_dist') >= radius
    index = torch.arange(points.shape[1], device=points.device).expand_as(outside)
    found = index.masked_fill(outside, points.shape[1]).topk(k, largest=False)[0]
    return torch.where(found < points.shape[1], found, found[..., :1])


def chamfer_cdist(x: Tensor, y: Tensor) -> Tensor:
    """The squared Chamfer distance with all pairs in the graph (and exact far from the origin)."""
    distance = torch.cdist(x, y, compute_mode='donot_use_mm_for_euclid_dist').square()
    return distance.min(1)[0].mean() + distance.min(2)[0].mean()


def chamfer_gather(nearest: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The squared Chamfer distance from indices ``nearest(x, y)`` that are found outside of the graph."""
    with torch.no_grad():
        there, back = nearest(x, y), nearest(y, x)

    def squared(a: Tensor, b: Tensor, index: Tensor) -> Tensor:
        return (a - b.gather(1, index.unsqueeze(-1).expand(-1, -1, 3))).square().sum(-1).mean()
    return squared(x, y, there) + squared(y, x, back)


def nearest_argmin(x: Tensor, y: Tensor) -> Tensor:
    """``(B, N)``: the nearest point of ``y``, some clouds at a time."""
    clouds = max(1, (1 << 22) // (x.shape[1] * y.shape[1]))
    return torch.cat([torch.cdist(a, b, compute_mode='donot_use_mm_for_euclid_dist').argmin(-1)
                      for a, b in zip(x.split(clouds), y.split(clouds))])


def nearest_trees(x: Tensor, y: Tensor) -> Tensor:
    """:func:`nearest_argmin` by k-d trees."""
    return knn_trees(x, y, 1)[1].squeeze(-1)


def _clouds(batch: int, points: int, settings: Settings) -> Tensor:
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randn(batch, points, 3, generator=generator).to(settings.device)


def _bound(function, *args):
    """A builder (see :class:`Case`) of ``function(*args)`` without gradients."""
    def call():
        with torch.no_grad():
            return function(*args)
    return lambda: call


def _trained(function, shapes: Sequence[tuple[int, ...]], dtype: str, settings: Settings):
    """A builder of ``function`` of tensors of these shapes, forward and backward."""
    def build():
        inputs = [torch.randn(shape, device=settings.device, dtype=DTYPES[dtype]).requires_grad_() for shape in shapes]
        gradient = torch.randn_like(function(*inputs))
        return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)
    return build
