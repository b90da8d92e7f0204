"""3DETR's encoder: set abstraction, then a transformer that may attend to what is near alone."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import Block
from ewa3d.ops.points import exporting
from ewa3d.registry import MODELS, nearest

__all__ = ['ACTIVATIONS', 'SetEncoder', 'init_xavier']

ACTIVATIONS = {'relu': nn.ReLU, 'gelu': nn.GELU}


@MODELS.register_module()
class SetEncoder(nn.Module):
    """The encoder of 3DETR (Misra et al. 2021): tokens without a positional embedding, pre-norm blocks, no final norm.

    With ``mask_radius`` it is the masked encoder of 3DETR-m: tokens attend to tokens that are nearer than a radius,
    another one in each block, and ``downsample`` thins them out behind the first block.

    Args:
        embed_dim: C, width of the tokens. depth: number of blocks. num_heads: of the attention.
        mlp_ratio: hidden width of an FFN, relative to ``embed_dim``.
        act_layer: its activation, ``'relu'`` or ``'gelu'``.
        tokenizer: a module, or the config of one, that maps inputs to tokens with coordinates.
        mask_radius: one radius a block, in metres; ``None`` or 0 does not mask.
        mask_radius_compat: the published 3DETR-m squares the radii and compares them with plain distances: its 0.4, 0.8
            and 1.2 m act as 0.16, 0.64 and 1.44 m. Its weights need that; ``False`` takes the radii as they are.
        downsample: a :class:`~ewa3d.layers.set_abstraction.SetAbstraction`, or the config of one, of points with
            ``embed_dim`` features; ``in_channels`` is filled in.
        proj_drop, attn_drop: dropout in both branches, and of the attention weights.

    Shape:
        - inputs: what the tokenizer takes; returns ``(B, L, embed_dim)``.

    Raises:
        TypeError, ValueError: numbers out of range, widths that do not fit each other, too few radii.
    """
    num_prefix_tokens = 0

    def __init__(self, tokenizer: dict | nn.Module, embed_dim: int = 256, depth: int = 3, num_heads: int = 4,
                 mlp_ratio: float = 0.5, proj_drop: float = 0.1, attn_drop: float = 0.1, act_layer: str = 'relu',
                 mask_radius: Sequence[float | None] | None = None, mask_radius_compat: bool = True,
                 downsample: dict | nn.Module | None = None):
        super().__init__()
        check_integer('SetEncoder: embed_dim', embed_dim, 1)
        self.embed_dim = embed_dim
        self.tokenizer = MODELS.build(tokenizer) if not isinstance(tokenizer, nn.Module) else tokenizer
        if downsample is not None and not isinstance(downsample, nn.Module):
            downsample = MODELS.build({'in_channels': 3 + embed_dim, **downsample})
        self.downsample = downsample
        for name, part in (('tokenizer', self.tokenizer), ('downsample', downsample)):
            if part is not None and part.embed_dim != embed_dim:
                raise ValueError(f'the {name} makes tokens of embed_dim={part.embed_dim}, the blocks expect '
                                 f'embed_dim={embed_dim}')
        self.blocks = make_blocks('SetEncoder', embed_dim, depth, num_heads, mlp_ratio, proj_drop, attn_drop, act_layer)
        self.radii = _radii(mask_radius, depth, mask_radius_compat)

    def encode(self, x: Tensor, coord: Tensor) -> tuple[Tensor, Tensor]:
        """Features, and where they are: fewer places than before where the encoder thins out.

        Shape:
            - x ``(B, L, C)``, coord ``(B, L, 3)``; returns such.
        """
        distance = None
        for i, (block, radius) in enumerate(zip(self.blocks, self.radii)):
            near = None
            if radius:
                if distance is None:
                    distance = _all_distances(coord)
                near = (distance < radius).unsqueeze(1)  # (B, 1, L, L): itself always
            x = block(x, attn_mask=near)
            if i == 0 and self.downsample is not None:
                fewer = self.downsample(torch.cat([coord, x.to(coord.dtype)], -1))
                x, coord = fewer.x, fewer.coord
                distance = None
        return x, coord

    def located(self, inputs, out_indices: Sequence[int] = (-1,)) -> tuple[tuple[Tensor], Tensor]:
        """The features behind the last block, the only ones there are with one set of places, and the places."""
        self.block_numbers(out_indices)
        tokens = self.tokenizer(inputs)
        x, coord = self.encode(tokens.x, tokens.coord)
        return (x,), coord

    def block_numbers(self, out_indices: Sequence[int]) -> list[int]:
        """The last block's; ``ValueError`` for others."""
        last = len(self.blocks) - 1
        if tuple(out_indices) not in ((-1,), (last,)):
            raise ValueError(f'out_indices={tuple(out_indices)}: this encoder gives the features of its last block '
                             'alone, (-1,)')
        return [last]

    def forward(self, inputs) -> Tensor:
        return self.located(inputs)[0][0]

    def extra_repr(self) -> str:
        return f'radii={self.radii}' if any(self.radii) else ''


def make_blocks(where: str, dim: int, depth: int, num_heads: int, mlp_ratio: float, proj_drop: float, attn_drop: float,
                act_layer: str = 'relu', cross: bool = False) -> nn.ModuleList:
    """Pre-norm blocks with biases everywhere, initialised as published.

    Raises:
        TypeError, ValueError: numbers out of range, an unknown activation.
    """
    check_integer(f'{where}: depth', depth, 1)
    for name, value in (('proj_drop', proj_drop), ('attn_drop', attn_drop)):
        check_number(f'{where}: {name}', value, '[0, 1]')
    if act_layer not in ACTIVATIONS:
        raise ValueError(f'{where}: act_layer={act_layer!r}; {nearest(act_layer, ACTIVATIONS)}')
    blocks = nn.ModuleList(
        Block(dim, num_heads, mlp_ratio, qkv_bias=True, proj_drop=proj_drop, attn_drop=attn_drop, cross=cross,
              act_layer=ACTIVATIONS[act_layer]) for _ in range(depth))
    return blocks.apply(init_xavier)


def init_xavier(module: nn.Module) -> None:
    """3DETR's initialisation, for ``module.apply``: linear weights Xavier-uniform, biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _radii(mask_radius: Sequence[float | None] | None, depth: int, compat: bool) -> tuple[float, ...]:
    """What distances are compared with, one number a block; 0 where it does not mask."""
    if mask_radius is None:
        return (0.,) * depth
    if isinstance(mask_radius, str) or not isinstance(mask_radius, Sequence) or len(mask_radius) != depth:
        raise ValueError(f'SetEncoder: mask_radius must be one radius for each of the {depth} blocks, got '
                         f'{mask_radius!r}')
    radii = [check_number('SetEncoder: each of mask_radius', radius or 0., '[0, inf)') for radius in mask_radius]
    return tuple(radius ** 2 if compat else radius for radius in radii)


def _all_distances(coord: Tensor) -> Tensor:
    """``(B, L, L)`` of ``(B, L, 3)``, from differences: the default of ``cdist`` loses digits in products. Runtimes of
    exported graphs have no ``cdist``."""
    if exporting():
        return (coord.unsqueeze(2) - coord.unsqueeze(1)).square().sum(-1).sqrt()
    return torch.cdist(coord, coord, compute_mode='donot_use_mm_for_euclid_dist')
