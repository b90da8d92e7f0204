"""Graph convolutions on patch tokens: the networks on both sides of Point-BERT's codebook."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer
from ewa3d.layers.block import Pointwise, pointwise
from ewa3d.ops import gather, patch_max

__all__ = ['DGCNN', 'EdgeConv']


class _GroupNorm(nn.GroupNorm):
    """Group norm of rows.

    Shape:
        - ``(B, ..., C)``, kept; statistics are taken over all rows of an example.
    """

    def __init__(self, num_groups: int, num_channels: int):
        if num_channels % num_groups:
            raise ValueError(f'DGCNN: {num_channels} channels cannot be split into norm_groups={num_groups}')
        super().__init__(num_groups, num_channels)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(x.shape[0], 1, -1, x.shape[-1])  # an image in channels-last format: nothing is copied
        return super().forward(rows.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(x.shape)


class EdgeConv(nn.Sequential):
    """Edge convolution on a fixed graph (Wang et al. 2019): of the edges ``[x_j - x_i, x_i]`` to a token's neighbours,
    a linear layer without bias, a group norm over all edges of a cloud, leaky ReLU and the maximum.

    The weight is kept as published, ``[W_a, W_b]``, and an edge is ``W_a x_j + (W_b - W_a) x_i``: both products are
    taken once a token, not once an edge. The activation is increasing, so the maximum may come before it.

    Shape:
        - x ``(B, G, in_channels)``, graph ``(B, G, K)`` int64: each token's neighbours; returns
          ``(B, G, out_channels)``. With ``query`` ``(B, M, in_channels)`` these take the place of ``x_i``: graph
          ``(B, M, K)`` then holds their neighbours in ``x``, and ``(B, M, out_channels)`` is returned.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int = 4):
        super().__init__(Pointwise(2 * in_channels, out_channels, bias=False), _GroupNorm(norm_groups, out_channels),
                         nn.LeakyReLU(0.2))

    def forward(self, x: Tensor, graph: Tensor, query: Tensor | None = None) -> Tensor:
        linear, norm, act = self
        of_neighbour, of_self = linear.weight.chunk(2, 1)
        own = pointwise(x if query is None else query, of_self - of_neighbour)  # (B, G or M, C)
        edges = norm(gather(pointwise(x, of_neighbour), graph) + own.unsqueeze(2))  # (B, G, K, C)
        return act(patch_max(edges.flatten(0, 1))).view_as(own)


class DGCNN(nn.Module):
    """Four edge convolutions on one graph, their outputs joined and mapped to ``out_channels`` (Yu et al. 2022).

    Args:
        widths: of the input layer and of the four edge convolutions.
        norm_groups: groups of every group norm.

    Shape:
        - x ``(B, G, in_channels)``, graph ``(B, G, K)`` int64; returns ``(B, G, out_channels)``.

    Raises:
        TypeError, ValueError: a width is no positive integer, or none of the norm's groups divide evenly.
    """

    def __init__(self, in_channels: int, out_channels: int, widths: Sequence[int] = (128, 256, 512, 512, 1024),
                 norm_groups: int = 4):
        super().__init__()
        if not isinstance(widths, Sequence) or isinstance(widths, str) or len(widths) != 5:
            raise ValueError(f'DGCNN: widths must be five integers, got {widths!r}')
        for name, value in (('in_channels', in_channels), ('out_channels', out_channels),
                            *(('each of widths', width) for width in widths)):
            check_integer(f'DGCNN: {name}', value, 1)
        self.input_trans = Pointwise(in_channels, widths[0])
        for i in range(1, 5):
            setattr(self, f'layer{i}', EdgeConv(widths[i - 1], widths[i], norm_groups))
        self.layer5 = nn.Sequential(Pointwise(sum(widths[1:]), out_channels, bias=False),
                                    _GroupNorm(norm_groups, out_channels), nn.LeakyReLU(0.2))

    def features(self, x: Tensor, graph: Tensor) -> list[Tensor]:
        """The outputs of the four edge convolutions."""
        x, outputs = self.input_trans(x), []
        for i in range(1, 5):
            x = getattr(self, f'layer{i}')(x, graph)
            outputs.append(x)
        return outputs

    def join(self, features: Sequence[Tensor]) -> Tensor:
        """What :meth:`forward` makes of :meth:`features`."""
        return self.layer5(torch.cat(list(features), -1))

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        return self.join(self.features(x, graph))

