"""Tokenizers turn raw input into :class:`~ewa3d.structures.Tokens`."""
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer
from ewa3d.layers.block import Pointwise, init_vit, pointwise
from ewa3d.ops import fps, gather, neighbours, patch_max
from ewa3d.registry import MODELS
from ewa3d.structures import Tokens

__all__ = ['PatchEncoder', 'PointPatchEmbed', 'group_points', 'points_of']


class PatchEncoder(nn.Module):
    """The mini-PointNet of Point-BERT and Point-MAE: one feature for each patch of points.

    The published layers are 1×1 convolutions; here they are linear layers on rows, which compute the same and are
    faster. The second stage sees ``[maximum over the patch, point]``; its first layer's weight is kept as published
    and used in two halves, so that the half for the maximum is computed once a patch instead of once a point.

    Shape:
        - ``(P, K, in_channels)`` to ``(P, out_channels)``, for ``P`` patches of ``K`` points; ``keep`` ``(V,)`` int64
          asks for the features of these patches alone, ``(V, out_channels)``.

    Raises:
        TypeError, ValueError: widths that are not three positive integers.
    """

    def __init__(self, in_channels: int = 3, out_channels: int = 384, widths: tuple[int, int, int] = (128, 256, 512)):
        super().__init__()
        if not isinstance(widths, Sequence) or len(widths) != 3:
            raise ValueError(f'widths must be three integers, got {widths!r}')
        for width in widths:
            check_integer('each of widths', width, 1)
        inner, middle, outer = widths
        self.first_conv = nn.Sequential(Pointwise(in_channels, inner), nn.BatchNorm1d(inner), nn.ReLU(inplace=True),
                                        Pointwise(inner, middle))
        self.second_conv = nn.Sequential(Pointwise(2 * middle, outer), nn.BatchNorm1d(outer), nn.ReLU(inplace=True),
                                         Pointwise(outer, out_channels))

    def forward(self, patches: Tensor, keep: Tensor | None = None) -> Tensor:
        first, norm, activation, second = self.first_conv
        x = second(normed(first(patches), norm, activation))  # (P, K, middle)
        _, norm, activation, last = self.second_conv
        x = normed(self._stage_two_input(x), norm, activation)  # (P, K, outer)
        if keep is not None:  # behind the last batch statistics, which are those of all patches with and without it
            x = x.index_select(0, keep)
        return patch_max(last(x))

    def _stage_two_input(self, x: Tensor) -> Tensor:
        linear = self.second_conv[0]
        of_maximum, of_point = linear.weight.chunk(2, 1)
        shared = F.linear(patch_max(x), of_maximum, linear.bias)  # (P, outer)
        return pointwise(x, of_point) + shared.unsqueeze(1)


def normed(x: Tensor, norm: nn.Module, activation: nn.Module) -> Tensor:
    """Norm and activation of the points of all patches: ``(P, K, C)``, kept."""
    return activation(norm(x.flatten(0, 1))).view(x.shape)  # the view comes last: one of them is in place


@MODELS.register_module()
class PointPatchEmbed(nn.Module):
    """Points to patch tokens (Point-BERT, Yu et al. 2022; Point-MAE, Pang et al. 2022).

    Centres by farthest point sampling, the nearest ``group_size`` points of each centre relative to it, a mini-PointNet
    for each patch, and an MLP of the centre for its position. Features beyond x, y, z (normals, colours) go into the
    mini-PointNet as they are.

    Args:
        num_groups: G, patches of a cloud. group_size: K, points of a patch.
        embed_dim: C, width of a token.
        encoder_dim: width of the patch feature; where given, ``reduce_dim`` maps it to ``embed_dim`` (Point-BERT).
        in_channels: 3 and the number of extra features.
        widths: the three hidden widths of the mini-PointNet.
        pos_dim: hidden width of the position MLP.
        skip_origin: sample centres by the rule of the published kernel (see :func:`ewa3d.ops.fps`).

    Shape:
        - ``inputs['points']`` (or a tensor) ``(B, N, in_channels)``.
        - returns :class:`~ewa3d.structures.Tokens` with ``L = num_groups``; ``target`` are the patches'
          local coordinates ``(B, L, group_size, 3)``.

    Raises:
        ValueError: fewer points than groups or neighbours, another number of channels, coordinates not finite.
        KeyError, TypeError: inputs without ``points``, or no tensor. Settings out of range or of another type.
    """

    def __init__(self, num_groups: int = 64, group_size: int = 32, embed_dim: int = 384, encoder_dim: int | None = None,
                 in_channels: int = 3, widths: tuple[int, int, int] = (128, 256, 512), pos_dim: int = 128,
                 skip_origin: bool = False):
        super().__init__()
        for name, value, least in (('num_groups', num_groups, 1), ('group_size', group_size, 1),
                                   ('embed_dim', embed_dim, 1), ('in_channels', in_channels, 3),
                                   ('pos_dim', pos_dim, 1), ('encoder_dim', encoder_dim or 1, 1)):
            check_integer(f'PointPatchEmbed: {name}', value, least)
        self.num_groups = num_groups
        self.group_size = group_size
        self.embed_dim = embed_dim
        self.in_channels = in_channels
        self.skip_origin = skip_origin
        self.encoder = PatchEncoder(in_channels, encoder_dim or embed_dim, widths)
        self.reduce_dim = nn.Linear(encoder_dim, embed_dim) if encoder_dim else nn.Identity()
        self.pos_embed = nn.Sequential(nn.Linear(3, pos_dim), nn.GELU(), nn.Linear(pos_dim, embed_dim))
        self.apply(init_vit)

    def group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Centres ``(B, G, 3)`` and patches ``(B, G, K, in_channels)`` relative to them."""
        if points.ndim != 3 or points.shape[-1] != self.in_channels:
            raise ValueError(f'points must have the shape (B, N, {self.in_channels}), got {tuple(points.shape)}')
        return group_points(points, self.num_groups, self.group_size, self.skip_origin)

    def embed(self, center: Tensor, patches: Tensor, keep: Tensor | None = None) -> Tokens:
        """Tokens of what :meth:`group` returned, or of a mixture of such.

        Args:
            keep: ``(B, V)`` numbers of the patches whose features are wanted: ``x`` and ``pos`` are then
                ``(B, V, embed_dim)``, and the layers behind the last batch statistics are spared the other patches.
        """
        (B, G), coord, rows = patches.shape[:2], center, None
        if keep is not None:
            coord = gather(center, keep)
            rows = (keep + torch.arange(B, device=keep.device).mul(G).unsqueeze(1)).flatten()
        x = self.encoder(patches.flatten(0, 1), rows).view(*coord.shape[:2], -1)  # (B, V or G, encoder_dim)
        return Tokens(self.reduce_dim(x), self.pos_embed(coord), center, patches[..., :3])

    def forward(self, inputs: dict | Tensor) -> Tokens:
        return self.embed(*self.group(points_of(inputs)))


def group_points(points: Tensor, num_groups: int, group_size: int, skip_origin: bool = False) -> tuple[Tensor, Tensor]:
    """Centres by farthest point sampling and the nearest points of each, relative to it.

    Args:
        skip_origin: see :func:`ewa3d.ops.fps`.

    Shape:
        - points ``(B, N, 3 + F)``; returns centres ``(B, num_groups, 3)`` and patches
          ``(B, num_groups, group_size, 3 + F)``, whose features are as they were.

    Raises:
        ValueError: another shape, fewer points than groups or neighbours, coordinates not finite.
    """
    if points.ndim != 3 or points.shape[-1] < 3:
        raise ValueError(f'points must have the shape (B, N, 3 + F), got {tuple(points.shape)}')
    if points.shape[1] < max(num_groups, group_size):
        raise ValueError(f'{points.shape[1]} points are too few for num_groups={num_groups} and '
                         f'group_size={group_size}')
    xyz = points[..., :3]
    center = gather(xyz, fps(xyz, num_groups, skip_origin=skip_origin))
    patches = gather(points, neighbours(center, xyz, group_size))  # (B, G, K, C)
    features = points.shape[-1] - 3
    offset = F.pad(center, (0, features)) if features else center
    return center, patches - offset.unsqueeze(2)


def points_of(inputs: Mapping | Tensor) -> Tensor:
    """The cloud of ``dict(points=...)``, or the tensor itself.

    Raises:
        KeyError, TypeError: inputs without ``points``, no tensor, or one of integers.
    """
    points = inputs
    if isinstance(inputs, Mapping):
        if 'points' not in inputs:
            raise KeyError(f"the inputs need the key 'points', found {sorted(map(str, inputs))}")
        points = inputs['points']
    if not isinstance(points, Tensor):
        raise TypeError(f'points must be a tensor (B, N, 3) or dict(points=...), got {type(points).__name__}')
    if not points.is_floating_point():
        raise TypeError(f'points must be floating-point numbers, got {points.dtype}')
    return points
