"""PointNet++'s set abstraction: fewer points, each with a feature of what lies around it."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import Pointwise
from ewa3d.layers.tokenizers import normed, points_of
from ewa3d.ops import ball_query, fps, gather, patch_max
from ewa3d.registry import MODELS
from ewa3d.structures import Tokens

__all__ = ['SetAbstraction']


@MODELS.register_module()
class SetAbstraction(nn.Module):
    """Points by farthest point sampling, the points in a ball around each, an MLP of them and the maximum (Qi et al.
    2017). As a tokenizer its tokens have no positional embedding: ``pos`` is zero.

    Args:
        num_points: how many points, or tokens, come out.
        radius, num_neighbors: the ball, in the unit of the points, and how many points of it are taken: the first, by
            index (see :func:`ewa3d.ops.ball_query`). Offsets within the ball are divided by the radius.
        widths: of the MLP's layers, each a linear layer, a batch norm and a ReLU; ``embed_dim`` is the last of them.
        in_channels: 3 and the number of features that points have.
        skip_origin: sample by the rule of the published kernel (see :func:`ewa3d.ops.fps`).

    Shape:
        - ``inputs['points']`` (or a tensor) ``(B, N, in_channels)``; returns
          :class:`~ewa3d.structures.Tokens` with ``L = num_points``, ``coord`` ``(B, L, 3)`` and no ``target``.

    Raises:
        ValueError: fewer points than ``num_points``, another number of channels, coordinates that are not finite.
        KeyError, TypeError: inputs without ``points``, or no tensor. Settings out of range or of another type.
    """

    def __init__(self, num_points: int = 2048, radius: float = 0.2, num_neighbors: int = 64,
                 widths: Sequence[int] = (64, 128, 256), in_channels: int = 3, skip_origin: bool = False):
        super().__init__()
        if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
            raise ValueError(f'SetAbstraction: widths must be one integer or more, got {widths!r}')
        for name, value, least in (('num_points', num_points, 1), ('num_neighbors', num_neighbors, 1),
                                   ('in_channels', in_channels, 3), ('each of widths', min(widths), 1)):
            check_integer(f'SetAbstraction: {name}', value, least)
        self.num_points, self.num_neighbors = num_points, num_neighbors
        self.radius = check_number('SetAbstraction: radius', radius, '(0, inf)')
        self.in_channels, self.embed_dim = in_channels, widths[-1]
        self.skip_origin = skip_origin
        inputs = (in_channels, *widths)
        self.mlp_convs = nn.ModuleList(Pointwise(a, b, bias=False) for a, b in zip(inputs, widths))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)
        for layer in self.mlp_convs:
            nn.init.kaiming_normal_(layer.weight)

    def group(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Centres ``(B, L, 3)`` and what lies around them, ``(B, L, num_neighbors, in_channels)``."""
        if points.ndim != 3 or points.shape[-1] != self.in_channels:
            raise ValueError(f'points must have the shape (B, N, {self.in_channels}), got {tuple(points.shape)}')
        if points.shape[1] < self.num_points:
            raise ValueError(f'{points.shape[1]} points are too few for num_points={self.num_points} tokens')
        xyz = points[..., :3]
        center = gather(xyz, fps(xyz, self.num_points, skip_origin=self.skip_origin))
        near = gather(points, ball_query(center, xyz, self.radius, self.num_neighbors))
        offset = (near[..., :3] - center.unsqueeze(2)) / self.radius
        return center, torch.cat([offset, near[..., 3:]], -1) if self.in_channels > 3 else offset

    def forward(self, inputs: dict | Tensor) -> Tokens:
        center, near = self.group(points_of(inputs))
        x = near.flatten(0, 1)  # (B L, K, in_channels)
        for layer, norm in zip(self.mlp_convs, self.mlp_bns):
            x = normed(layer(x), norm, nn.functional.relu)
        x = patch_max(x).view(*center.shape[:2], -1)  # (B, L, embed_dim)
        return Tokens(x, x.new_zeros(()).expand_as(x), center)

    def extra_repr(self) -> str:
        return f'num_points={self.num_points}, radius={self.radius:g}, num_neighbors={self.num_neighbors}'
