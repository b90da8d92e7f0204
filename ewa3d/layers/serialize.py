"""Tokens in space as a sequence: they are visited along a Hilbert or a z-order curve, or along several in turn.

A curve gives every cell of a grid of ``2^depth`` cells a side a number; both maps, there and back, are exact.
"""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.ops import gather
from ewa3d.ops.points import exporting
from ewa3d.registry import nearest
from ewa3d.structures import Tokens

__all__ = ['ORDERS', 'Serializer', 'curve_order', 'grid_cells', 'hilbert_decode', 'hilbert_encode', 'inverse_order',
           'random_order', 'refuse_order', 'z_decode', 'z_encode']

ORDERS = ('hilbert', 'hilbert-trans', 'z', 'z-trans')
"""``-trans`` has the first two axes exchanged."""
RANDOM = 'random'


def grid_cells(coord: Tensor, grid_size: float = 0.02, depth: int = 10) -> Tensor:
    """The cells of a grid that coordinates lie in, counted from each sample's lowest.

    The depth is fixed, so that the order of a sample does not depend on what else is in the batch.

    Shape:
        - coord ``(B, L, D)``; returns ``(B, L, D)`` int64 in ``[0, 2^depth)``.

    Raises:
        ValueError: a sample larger than the grid, coordinates not finite; on a GPU, which would have to wait for the
            look at them, the cells are clamped instead.
    """
    if coord.ndim != 3 or not coord.is_floating_point():
        raise ValueError(f'coordinates (B, L, D) expected, got {coord.dtype} {tuple(coord.shape)}')
    check_number('grid_size', grid_size, '(0, inf)')
    _check_depth(depth, coord.shape[-1])
    coord = coord.detach() if coord.dtype == torch.float64 else coord.detach().float()
    cells = coord.div(grid_size).floor()
    if cells.numel():
        cells = cells - cells.amin(1, keepdim=True)
    if cells.device.type == 'cpu' and cells.numel() and not torch.compiler.is_compiling():
        largest = float(cells.max())  # NaN where one is
        if not largest < 2 ** depth:
            raise ValueError(f'coordinates must be finite and span at most 2^{depth} cells of grid_size={grid_size}, '
                             f'got a span of {largest:g} cells; a larger grid_size or depth takes more')
    return cells.clamp_(0, 2 ** depth - 1).long()


def hilbert_encode(cells: Tensor, depth: int) -> Tensor:
    """The number of each cell along the Hilbert curve, by Skilling's transform (2004): neighbours along the curve are
    neighbours in the grid.

    Shape:
        - cells ``(..., D)`` int64 in ``[0, 2^depth)``; returns ``(...)`` int64 in ``[0, 2^(D depth))``.

    Raises:
        ValueError: ``D · depth`` above 63 bits; TypeError: cells that are no int64.
    """
    axes = _axes(cells, depth)
    for level in range(depth - 1, 0, -1):
        for i in range(len(axes)):
            axes[0], axes[i] = _turned(axes[0], axes[i], level, i)
    for i in range(1, len(axes)):  # Gray code
        axes[i] = axes[i] ^ axes[i - 1]
    flips = torch.zeros_like(axes[-1])
    for level in range(depth - 1, 0, -1):
        flips = flips ^ ((axes[-1] >> level) & 1) * ((1 << level) - 1)
    return z_encode(torch.stack([axis ^ flips for axis in axes], -1), depth)


def hilbert_decode(code: Tensor, dims: int, depth: int) -> Tensor:
    """The cell ``(..., dims)`` of each number along the Hilbert curve: the inverse of :func:`hilbert_encode`."""
    axes = list(z_decode(code, dims, depth).unbind(-1))
    gray = axes[-1] >> 1
    for i in range(dims - 1, 0, -1):
        axes[i] = axes[i] ^ axes[i - 1]
    axes[0] = axes[0] ^ gray
    for level in range(1, depth):
        for i in range(dims - 1, -1, -1):
            axes[0], axes[i] = _turned(axes[0], axes[i], level, i)
    return torch.stack(axes, -1)


def z_encode(cells: Tensor, depth: int) -> Tensor:
    """The number of each cell in z-order (Morton): bit ``j`` of axis ``i`` is bit ``D j + D - 1 - i``.

    Shape:
        - as :func:`hilbert_encode`.
    """
    axes, code = _axes(cells, depth), 0
    for i, axis in enumerate(axes):
        for j in range(depth):
            code = code | ((axis >> j) & 1) << (len(axes) * j + len(axes) - 1 - i)
    return code


def z_decode(code: Tensor, dims: int, depth: int) -> Tensor:
    """The cell ``(..., dims)`` of each number in z-order: the inverse of :func:`z_encode`.

    Raises:
        TypeError: numbers that are not int64.
    """
    _check_depth(depth, check_integer('dims', dims, 1))
    if code.dtype != torch.int64:
        raise TypeError(f'numbers of cells are int64, got {code.dtype}')
    axes = [sum(((code >> (dims * j + dims - 1 - i)) & 1) << j for j in range(depth)) for i in range(dims)]
    return torch.stack(axes, -1)


def _turned(first: Tensor, axis: Tensor, level: int, i: int) -> tuple[Tensor, Tensor]:
    """Skilling's step at one bit of one axis: where it is set, the lower bits of the first axis are inverted, elsewhere
    they are exchanged with those of this axis."""
    low = (1 << level) - 1
    is_set = ((axis >> level) & 1).bool()
    if i == 0:
        first = torch.where(is_set, first ^ low, first)
        return first, first
    swap = ((first ^ axis) & low).masked_fill(is_set, 0)
    return torch.where(is_set, first ^ low, first ^ swap), axis ^ swap


def _axes(cells: Tensor, depth: int) -> list[Tensor]:
    if cells.dtype != torch.int64:
        raise TypeError(f'cells are int64, got {cells.dtype}')
    _check_depth(depth, cells.shape[-1])
    return list(cells.unbind(-1))


def _check_depth(depth: int, dims: int) -> None:
    if check_integer('depth', depth, 1) * dims > 63:
        raise ValueError(f'depth={depth} in {dims} dimensions needs {depth * dims} bits; an int64 has 63')


def curve_order(coord: Tensor, order: str = 'hilbert', grid_size: float = 0.02, depth: int = 10) -> Tensor:
    """The numbers of the tokens in the order in which a curve visits them; in one cell, as they come.

    Args:
        order: one of :data:`ORDERS`.
        grid_size: the side of a cell. depth: 2^depth cells a side.

    Shape:
        - coord ``(B, L, D)``; returns ``(B, L)`` int64.

    Raises:
        ValueError: another order, and as :func:`grid_cells`.
    """
    if order not in ORDERS:
        raise ValueError(f'order={order!r}: {nearest(order, ORDERS)}')
    cells = grid_cells(coord, grid_size, depth)
    if order.endswith('-trans'):
        cells = torch.cat([cells[..., :2].flip(-1), cells[..., 2:]], -1)
    code = (hilbert_encode if order.startswith('hilbert') else z_encode)(cells, depth)
    L = code.shape[1]
    if exporting() and depth * coord.shape[-1] <= 42:  # ONNX has no stable sort: numbers of which none are alike
        return (code * 2 ** 20 + torch.arange(L, device=code.device)).argsort(dim=1)
    return code.argsort(dim=1, stable=True)


def random_order(coord: Tensor, training: bool) -> Tensor:
    """An order that follows nothing, to compare curves with: in training each sample's own, drawn anew at every call;
    else one that depends on the number of tokens alone, so that a result does not change from call to call.

    Shape:
        - coord ``(B, L, D)``; returns ``(B, L)`` int64.
    """
    B, L = coord.shape[:2]
    if training:
        return torch.rand(B, L, device=coord.device).argsort(1)
    mixed = torch.arange(1, L + 1, device=coord.device)
    for factor in (0x9E3779B1, 0x85EBCA6B):  # the bits of numbers below 2^32, mixed by multiplication and shifts
        mixed = mixed * factor & 0xFFFFFFFF
        mixed = mixed ^ mixed >> 15
    return mixed.argsort(stable=True).expand(B, -1)


def inverse_order(order: Tensor) -> Tensor:
    """Where each token went: ``gather(gather(x, order), inverse_order(order))`` is ``x``. ``(B, L)``, kept."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def refuse_order(backbone: nn.Module, name: str) -> None:
    """Raise where ``backbone`` puts its tokens in another order than the tokenizer, whose patches ``name`` masks."""
    orders = getattr(getattr(backbone, 'serializer', None), 'orders', None)
    if orders is not None:
        raise ValueError(f'{name} masks the patches as its tokenizer gives them, and the backbone has '
                         f'order={list(orders)}: leave it out')


class Serializer(nn.Module):
    """Tokens in the order of a curve, or at random; with several orders, one copy of all tokens after another.

    With several, each copy of ``x`` has a learnt scale and shift of its own (PointMamba's "order scale").

    Args:
        orders: one of :data:`ORDERS` or ``'random'`` (see :func:`random_order`), or several.
        embed_dim: C.
        grid_size, depth: of :func:`curve_order`.

    Shape:
        - :class:`~ewa3d.structures.Tokens` of L tokens to such of ``len(orders) · L``.

    Raises:
        ValueError: no order, one twice, an unknown one. TypeError: orders that are no names.
    """

    def __init__(self, orders: str | Sequence[str], embed_dim: int, grid_size: float = 0.02, depth: int = 10):
        super().__init__()
        orders = (orders,) if isinstance(orders, str) else orders
        if not isinstance(orders, Sequence) or not all(isinstance(order, str) for order in orders):
            raise TypeError(f'order is a name or a list of names, got {orders!r}')
        for order in orders:
            if order not in (*ORDERS, RANDOM):
                raise ValueError(f'order={order!r}: {nearest(order, (*ORDERS, RANDOM))}')
        if not orders or len(set(orders)) < len(orders):
            raise ValueError(f'order={list(orders)} must name at least one order, and each once')
        self.orders = tuple(orders)
        self.grid_size = check_number('order_grid', grid_size, '(0, inf)')
        self.depth = check_integer('depth', depth, 1)
        if len(self.orders) > 1:
            self.weight = nn.Parameter(1 + 0.02 * torch.randn(len(orders), embed_dim))
            self.bias = nn.Parameter(0.02 * torch.randn(len(orders), embed_dim))

    def no_weight_decay(self) -> set[str]:
        """The names of the scale and the shift."""
        return {'weight', 'bias'}

    def forward(self, tokens: Tokens) -> Tokens:
        parts = []
        for i, name in enumerate(self.orders):
            order = random_order(tokens.coord, self.training) if name == RANDOM else \
                curve_order(tokens.coord, name, self.grid_size, self.depth)
            x, pos, coord = (gather(value, order) for value in (tokens.x, tokens.pos, tokens.coord))
            target = None if tokens.target is None else \
                gather(tokens.target.flatten(2), order).unflatten(-1, tokens.target.shape[2:])
            if len(self.orders) > 1:
                x = x * self.weight[i] + self.bias[i]
            parts.append((x, pos, coord, target))
        joined = parts[0] if len(parts) == 1 else \
            [None if part[0] is None else torch.cat(part, 1) for part in zip(*parts)]
        return Tokens(*joined, tokens.prefix_pos)

    def extra_repr(self) -> str:
        return f'orders={list(self.orders)}, grid_size={self.grid_size:g}, depth={self.depth}'
