"""Upright boxes ``(cx, cy, cz, dx, dy, dz, yaw)``: full sizes, z up, yaw counter-clockwise from +x.

The area in which two rotated rectangles overlap is integrated, not assembled from vertices. In the frame of one of
them, which is a window ``[x, X] × [y, Y]`` there, every edge of the other one adds the area between it and the x axis,
with its height cut to ``[y, Y]`` and its ends to ``[x, X]``; around the closed outline this adds up to the overlap. No
case is special: no vertices are sorted or dropped, so that touching, equal and empty boxes lose no accuracy, and all
steps are elementwise over the pairs.
"""
import functools

import torch
from torch import Tensor

from ewa3d.checks import check_number

__all__ = ['box3d_corners', 'box3d_giou', 'box3d_intersection', 'box3d_iou', 'box3d_volume', 'check_boxes', 'nms3d',
           'official_giou', 'points_in_boxes']

CHUNK = 1 << 17  # pairs of a point and a box that are looked at together
# Signs of the corners: bottom face, then top face, each clockwise seen from above; 3DETR's order.
SIGNS = ((1, 1, -1), (1, -1, -1), (-1, -1, -1), (-1, 1, -1), (1, 1, 1), (1, -1, 1), (-1, -1, 1), (-1, 1, 1))


def check_boxes(boxes: Tensor, name: str = 'boxes') -> None:
    """Raise unless ``boxes`` is a tensor ``(…, N, 7)`` of real numbers.

    Raises:
        TypeError, ValueError: naming what it is instead.
    """
    if not isinstance(boxes, Tensor) or boxes.dtype == torch.bool or boxes.is_complex():
        found = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f'{name} must be a tensor of numbers (…, N, 7), got {found}')
    if boxes.ndim < 2 or boxes.shape[-1] != 7:
        raise ValueError(f'{name} must be (…, N, 7): centre, sizes, yaw; got {tuple(boxes.shape)}')


def box3d_corners(boxes: Tensor) -> Tensor:
    """The corners: of the bottom face (+x +y), (+x −y), (−x −y), (−x +y) in the box's own frame, then of the top face.

    Shape:
        - boxes ``(…, 7)``; returns ``(…, 8, 3)``.
    """
    half = boxes[..., None, 3:6] / 2 * boxes.new_tensor(SIGNS)  # (…, 8, 3)
    cos, sin = boxes[..., 6:].cos(), boxes[..., 6:].sin()
    x, y, z = half.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos, z], dim=-1) + boxes[..., None, :3]


def box3d_volume(boxes: Tensor) -> Tensor:
    """Volumes ``(…,)`` of boxes ``(…, 7)``; a negative size counts as 0."""
    return _product(boxes[..., 3:6].clamp(min=0))


def box3d_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs of rotated boxes, with gradient.

    Two boxes without a volume have the IoU 0; a negative size counts as 0. Gradients are finite everywhere, and one of
    the possible ones at a kink (equal boxes, touching faces).

    Shape:
        - a ``(…, N, 7)``, b ``(…, M, 7)``; returns ``(…, N, M)`` in their dtype, float32 for anything below.

    Raises:
        TypeError, ValueError: no tensors of boxes, or shapes that do not fit each other.
    """
    return _Pairs(a, b).iou()


def box3d_giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of all pairs of rotated boxes, with gradient: ``IoU − (hull − union) / hull``, where the hull is
    the axis-aligned box around the corners of both, as in 3DETR. Between −1 and 1; 0 where the hull has no volume.

    The hull of a turned box is larger than the box, so that equal boxes reach 1 only where they are axis-aligned.

    Shape:
        - a ``(…, N, 7)``, b ``(…, M, 7)``; returns ``(…, N, M)`` (see :func:`box3d_iou`).
    """
    pairs = _Pairs(a, b)
    hull = pairs.hull()
    return pairs.iou() - (hull - pairs.union()).clamp(min=0) / _positive(hull)


def box3d_intersection(a: Tensor, b: Tensor) -> Tensor:
    """The volume in which boxes overlap, all pairs (see :func:`box3d_iou`).

    Shape:
        - a ``(…, N, 7)``, b ``(…, M, 7)``; returns ``(…, N, M)``.
    """
    return _Pairs(a, b).intersection()


def official_giou(a: Tensor, b: Tensor, rotated: bool) -> Tensor:
    """The GIoU with which 3DETR was trained: for comparison with its numbers, not for use.

    It differs from :func:`box3d_giou`: a pair whose corners 2 and 0 do not overlap as if they were the minimum and the
    maximum of axis-aligned boxes has no intersection, which is right near yaw 0 only; with ``rotated=False`` the
    overlap of these is the area. Edges count as 1 mm at least, volumes as 1e-8, and a pair of such boxes as 0.

    Shape:
        - a ``(…, N, 7)``, b ``(…, M, 7)``; returns ``(…, N, M)``.
    """
    pairs = _Pairs(a, b)
    (low, high), (low_b, high_b) = (_opposite_corners(boxes) for boxes in (pairs.a, pairs.b))
    offset = pairs.offset[..., :2]
    width = (torch.minimum(high + offset, high_b) - torch.maximum(low + offset, low_b)).clamp(min=0)
    taken = _product(width)
    area = torch.where(taken > 0, pairs.area(), 0) if rotated else taken
    volume_a, volume_b = (_product(boxes[..., 3:6].abs().clamp(min=1e-3)).clamp(min=1e-8) for boxes in
                          (pairs.a, pairs.b))
    intersection, hull = area * pairs.height(), pairs.hull()
    union = (volume_a + volume_b - intersection).clamp(min=1e-8)
    good = (hull > 2e-8) & (volume_a + volume_b > 4e-8)
    return torch.where(good, intersection / union - 1 + union / _positive(hull), 0)


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """Which points lie in which boxes, faces included. A few boxes are looked at together, never all pairs.

    Shape:
        - points ``(…, P, 3+F)``, boxes ``(…, N, 7)``; returns bool ``(…, N, P)``.

    Raises:
        TypeError, ValueError: no tensors of boxes, or shapes that do not fit each other.
    """
    check_boxes(boxes)
    if points.ndim != boxes.ndim or points.shape[-1] < 3 or points.shape[:-2] != boxes.shape[:-2]:
        raise ValueError(f'points_in_boxes: points (…, P, 3+F) and boxes (…, N, 7) expected, got '
                         f'{tuple(points.shape)} and {tuple(boxes.shape)}')
    shape = (*boxes.shape[:-1], points.shape[-2])
    inside = torch.empty(shape, dtype=torch.bool, device=points.device)
    step = max(1, CHUNK // max(1, points[..., 0].numel()))
    x, y, z = (axis.unsqueeze(-2) for axis in points[..., :3].detach().unbind(-1))  # (…, 1, P)
    for first in range(0, boxes.shape[-2], step):
        some = boxes[..., first:first + step, :].detach().unsqueeze(-1)  # (…, n, 7, 1)
        cx, cy, cz, dx, dy, dz, yaw = some.unbind(-2)
        cos, sin, px, py = yaw.cos(), yaw.sin(), x - cx, y - cy
        inside[..., first:first + step, :] = (((px * cos + py * sin).abs() <= dx / 2)
                                              & ((py * cos - px * sin).abs() <= dy / 2) & ((z - cz).abs() <= dz / 2))
    return inside


def nms3d(boxes: Tensor, scores: Tensor, threshold: float = 0.25, labels: Tensor | None = None,
          over: str = 'union', axes: str = 'xyz') -> Tensor:
    """Non-maximum suppression on the axis-aligned hulls of boxes, as VoteNet and 3DETR do it: the best box stays, and
    those that overlap it by more than ``threshold`` go.

    Args:
        labels: ``(N,)``; only boxes of one label suppress each other.
        over: the overlap is divided by the ``'union'``, or by the size of the ``'worse'`` box (VoteNet's old form).
        axes: ``'xy'`` looks from above.

    Shape:
        - boxes ``(N, 7)``, scores ``(N,)``; returns the indices that stay, best first (equal scores: the first).

    Raises:
        TypeError, ValueError: no boxes ``(N, 7)`` with as many scores and labels, or another option.
    """
    check_boxes(boxes)
    check_number('nms3d: threshold', threshold)
    if over not in ('union', 'worse') or axes not in ('xyz', 'xy'):
        raise ValueError(f"nms3d: over must be 'union' or 'worse' and axes 'xyz' or 'xy', got {over!r} and {axes!r}")
    for name, values in (('scores', scores), ('labels', labels)):
        if values is not None and (boxes.ndim != 2 or values.shape != boxes.shape[:1]):
            raise ValueError(f'nms3d: boxes (N, 7) and {name} (N,) expected, got {tuple(boxes.shape)} and '
                             f'{tuple(values.shape)}')
    order = scores.detach().argsort(descending=True, stable=True)
    boxes = boxes.detach()[order]
    half = torch.cat([_reach(boxes), _half(boxes)[:, 2:]], dim=-1)[:, :len(axes)]
    offset = (boxes[:, None] - boxes[None])[..., :len(axes)]
    overlap, size = _product(_overlap(offset, half[:, None], half)), _product(2 * half)
    whole = size[:, None] + size - overlap if over == 'union' else size.expand_as(overlap)
    beaten = overlap > threshold * whole
    if labels is not None:
        beaten &= labels[order, None] == labels[order]
    beaten, stays = beaten.cpu().numpy(), torch.ones(len(order), dtype=torch.bool).numpy()
    for i in range(len(order)):
        if stays[i]:
            stays[i + 1:] &= ~beaten[i, i + 1:]
    return order[torch.from_numpy(stays).to(order.device)]


class _Pairs:
    """All pairs of two sets of boxes, in float32 at least, relative to ``b``; each quantity is computed once."""

    def __init__(self, a: Tensor, b: Tensor):
        check_boxes(a, 'the first boxes')
        check_boxes(b, 'the second boxes')
        if a.shape[:-2] != b.shape[:-2]:
            raise ValueError(f'boxes (…, N, 7) and (…, M, 7) with equal … expected, got {tuple(a.shape)} and '
                             f'{tuple(b.shape)}')
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        self.a, self.b = a.to(dtype).unsqueeze(-2), b.to(dtype).unsqueeze(-3)  # (…, N, 1, 7) and (…, 1, M, 7)
        self.offset = self.a[..., :3] - self.b[..., :3]
        self.half = tuple(torch.cat([_reach(boxes), _half(boxes)[..., 2:]], dim=-1) for boxes in (self.a, self.b))
        self._intersection = None

    def iou(self) -> Tensor:
        return self.intersection() / _positive(self.union())

    def union(self) -> Tensor:
        return box3d_volume(self.a) + box3d_volume(self.b) - self.intersection()

    def intersection(self) -> Tensor:
        if self._intersection is None:
            self._intersection = self.area() * self.height()
        return self._intersection

    def height(self) -> Tensor:
        """How much they overlap along z."""
        return _overlap(self.offset, *self.half)[..., 2]

    def hull(self) -> Tensor:
        """The volume of the axis-aligned box around both."""
        a, b = self.half
        return _product(torch.maximum(self.offset + a, b) - torch.minimum(self.offset - a, -b))

    def area(self) -> Tensor:
        """The area in which they overlap, seen from above. Most pairs are apart: a CPU looks at the others alone;
        elsewhere that would wait for the device."""
        if self.a.device.type != 'cpu':
            return common_area(self.a, self.b)
        with torch.no_grad():
            near = (self.offset.abs() <= self.half[0] + self.half[1]).all(-1)
            index = near.flatten().nonzero().flatten()
        N, M = near.shape[-2:]
        a = self.a.reshape(-1, 7).index_select(0, index // max(M, 1))
        b = self.b.reshape(-1, 7).index_select(0, index // max(N * M, 1) * M + index % max(M, 1))
        return a.new_zeros(near.numel()).index_copy(0, index, common_area(a, b)).view(near.shape)


def common_area(a: Tensor, b: Tensor) -> Tensor:
    """The area in which boxes ``(…, 7)`` overlap ``b``, broadcast, seen from above."""
    (wa, ha), (wb, hb) = (_half(boxes)[..., :2].unbind(-1) for boxes in (a, b))
    x, y = _turned(a[..., :2] - b[..., :2], -b[..., 6])
    area = overlap_area(x, y, wa, ha, a[..., 6] - b[..., 6], wb, hb)
    return torch.minimum(area.clamp(min=0), torch.minimum(4 * wa * ha, 4 * wb * hb))  # rounding


def overlap_area(x: Tensor, y: Tensor, wa: Tensor, ha: Tensor, turn: Tensor, wb: Tensor, hb: Tensor) -> Tensor:
    """The area in which a rectangle overlaps an axis-aligned one at the origin (see the module's docstring).

    Args:
        x, y: centre of the first one. turn: its angle. wa, ha, wb, hb: half sizes. All of one shape, or broadcast.
    """
    # Relative to the first one's centre, so that a small one in a large one is as exact as by itself.
    cos, sin = turn.cos(), turn.sin()
    ux, uy, vx, vy = wa * cos, wa * sin, -ha * sin, ha * cos  # its half axes
    px = torch.stack(torch.broadcast_tensors(ux - vx, -ux - vx, vx - ux, ux + vx))  # (4, …), clockwise
    py = torch.stack(torch.broadcast_tensors(uy - vy, -uy - vy, vy - uy, uy + vy))
    left, right, low, high = -x - wb, wb - x, -y - hb, hb - y
    cut = px.clamp(left, right)
    dx, dy, step = _to_next(px), _to_next(py), _to_next(cut)
    slope = dy * torch.where(dx.abs() > _tiny(dx), dx, 1).reciprocal()
    level = mean_between(py + (cut - px) * slope, step * slope, low, high)
    base = torch.zeros_like(low).clamp(low.detach(), high.detach())  # any level will do; this one rounds least
    return (step * (level - base)).sum(0)


def mean_between(start: Tensor, rise: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The mean of ``clamp(start + u · rise, low, high)`` over ``u`` in [0, 1].

    Where the line enters and leaves ``[low, high]`` needs no gradient: there the two pieces have the same value.
    """
    with torch.no_grad():
        down = torch.where(rise.abs() > _tiny(rise), rise, _tiny(rise))
        enter, leave = ((bound - start).div_(down).clamp_(0, 1) for bound in (low, high))
        middle = (leave - enter).abs_()
        centre = (enter + leave).div_(2)
        below = torch.where(down > 0, enter, 1 - enter)
        above = 1 - below - middle
    return below * low + above * high + middle * (start + centre * rise)


def _to_next(values: Tensor) -> Tensor:
    return values.roll(-1, 0) - values


def _turned(vectors: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    (x, y), cos, sin = vectors.unbind(-1), angle.cos(), angle.sin()
    return x * cos - y * sin, x * sin + y * cos


def _overlap(offset: Tensor, half_a: Tensor, half_b: Tensor) -> Tensor:
    """The common length of two intervals whose centres are ``offset`` apart."""
    return (torch.minimum(offset + half_a, half_b) - torch.maximum(offset - half_a, -half_b)).clamp(min=0)


def _half(boxes: Tensor) -> Tensor:
    return boxes[..., 3:6].clamp(min=0) / 2


def _reach(boxes: Tensor) -> Tensor:
    """Half the size of the axis-aligned hull along x and y, ``(…, 2)``."""
    half, cos, sin = _half(boxes)[..., :2], boxes[..., 6:].cos().abs(), boxes[..., 6:].sin().abs()
    return half * cos + half.flip(-1) * sin


def _opposite_corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Corners 2 and 0 relative to the centre, seen from above, ``(…, 2)``."""
    corner = torch.stack(_turned(boxes[..., 3:5] / 2, boxes[..., 6]), dim=-1)
    return -corner, corner


def _product(values: Tensor) -> Tensor:
    """Of the last axis; the gradient of ``prod`` looks for zeros."""
    return functools.reduce(torch.mul, values.unbind(-1))


def _positive(values: Tensor) -> Tensor:
    return values.clamp(min=torch.finfo(values.dtype).tiny)


def _tiny(values: Tensor) -> float:
    """So little that its reciprocal is still finite, in products with sizes too."""
    return torch.finfo(values.dtype).tiny ** 0.5
