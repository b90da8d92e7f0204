"""From the features of a cloud to those of object queries: 3DETR's decoder."""
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer
from ewa3d.layers.block import Pointwise
from ewa3d.layers.tokenizers import points_of
from ewa3d.models.detection.encoder import make_blocks
from ewa3d.ops import fps, gather
from ewa3d.registry import MODELS

__all__ = ['FourierEmbedding', 'QueryDecoder', 'QueryFeatures', 'pointwise_mlp']


class QueryFeatures(NamedTuple):
    """What a detection head takes.

    Shape:
        - x: ``(depth, B, Q, C)``, the queries behind each block of the decoder.
        - coord: ``(B, Q, 3)``, where the queries are.
        - low, high: ``(B, 3)``, the corners of the cloud.
    """
    x: Tensor
    coord: Tensor
    low: Tensor
    high: Tensor


class FourierEmbedding(nn.Module):
    """Places in a cloud as sines and cosines of random projections (Tancik et al. 2020), drawn once and stored.

    Shape:
        - coord ``(B, L, 3)``, low and high ``(B, 3)``, which are mapped to 0 and 1; returns ``(B, L, dim)``.

    Raises:
        ValueError: an odd ``dim``.
    """

    def __init__(self, dim: int):
        super().__init__()
        if check_integer('FourierEmbedding: dim', dim, 2) % 2:
            raise ValueError(f'FourierEmbedding: dim={dim} cannot be split into as many sines as cosines')
        self.register_buffer('gauss_B', torch.randn(3, dim // 2))

    def forward(self, coord: Tensor, low: Tensor, high: Tensor) -> Tensor:
        with torch.autocast(coord.device.type, enabled=False):  # angles of many turns
            angle = 2 * math.pi * in_range(coord, low, high) @ self.gauss_B.to(coord.dtype)
        return torch.cat([angle.sin(), angle.cos()], -1)


def in_range(coord: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Coordinates ``(..., L, 3)`` with ``low`` ``(..., 3)`` at 0 and ``high`` at 1; a flat cloud's third one stays
    finite."""
    extent = high - low
    return (coord - low.unsqueeze(-2)) / torch.where(extent > 0, extent, 1).unsqueeze(-2)


def pointwise_mlp(dims: Sequence[int], dropout: float | None = None, bias: bool = False, norm: bool = True,
                  last: str = 'linear') -> nn.Sequential:
    """An MLP on rows ``(R, dims[0])``: linear, batch norm, ReLU and dropout, numbered as in the published layers.

    Args:
        bias, norm: of the hidden layers.
        last: the last layer is ``'linear'``, with a bias, or as the ``'hidden'`` ones, without dropout.
    """
    layers: list[nn.Module] = []
    for i, (inputs, width) in enumerate(pairwise(dims)):
        is_last = i == len(dims) - 2
        if is_last and last == 'linear':
            layers.append(Pointwise(inputs, width))
            break
        layers += [Pointwise(inputs, width, bias=bias), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
        layers += [nn.Dropout(dropout)] if dropout is not None and not is_last else []
    return nn.Sequential(*layers)


@MODELS.register_module()
class QueryDecoder(nn.Module):
    """A neck: queries at some of the tokens ask all of them for objects, block by block (3DETR, Misra et al. 2021).

    Queries are at the farthest points of the tokens' places and start from zero; what tells them apart is the embedding
    of these places, which every block adds to what queries and keys are made of. With ``content`` they start from what
    is around them, as the candidates of Group-Free 3D (Liu et al. 2021) do from a point's features: that learns in far
    fewer steps.

    Args:
        depth: number of blocks. num_heads: of both attentions of a block.
        mlp_ratio: hidden width of an FFN, relative to ``decoder_dim``.
        proj_drop, attn_drop: dropout in the branches, and of the attention weights.
        embed_dim, num_prefix_tokens, skip_origin: the backbone's; ``TaskModel`` fills them in.
        num_queries: at most as many as there are tokens.
        decoder_dim: width of the blocks; the backbone's unless given.
        content: a :class:`~ewa3d.layers.set_abstraction.SetAbstraction` of the tokens, or the config of one: its
            features at the queries' places are what these start from; ``num_points``, ``in_channels`` and ``widths``
            are filled in.
        project_depth: layers between the backbone and the blocks (3DETR 3, 3DETR-m 2).
        out_indices: the block of the backbone whose features are taken.

    Shape:
        - features of one block ``((B, P + L, embed_dim),)``, coord ``(B, L, 3)``, inputs with ``points``; returns
          :class:`QueryFeatures`.

    Raises:
        TypeError, ValueError: numbers missing or out of range, fewer tokens than queries.
    """

    def __init__(self, embed_dim: int | None = None, num_queries: int = 256, decoder_dim: int | None = None,
                 depth: int = 8, num_heads: int = 4, mlp_ratio: float = 1., proj_drop: float = 0.1,
                 attn_drop: float = 0.1, project_depth: int = 3, num_prefix_tokens: int = 0, skip_origin: bool = False,
                 out_indices: Sequence[int] = (-1,), content: dict | nn.Module | None = None):
        super().__init__()
        if embed_dim is None:
            raise ValueError('QueryDecoder: embed_dim is not set (TaskModel fills in its backbone\'s)')
        dim = decoder_dim = embed_dim if decoder_dim is None else decoder_dim
        for name, value in (('embed_dim', embed_dim), ('decoder_dim', dim), ('num_queries', num_queries),
                            ('project_depth', project_depth)):
            check_integer(f'QueryDecoder: {name}', value, 1)
        if isinstance(out_indices, str) or not isinstance(out_indices, Sequence) or len(out_indices) != 1:
            raise ValueError(f'QueryDecoder: out_indices must name one block, such as (-1,), got {out_indices!r}')
        self.num_queries, self.decoder_dim, self.out_indices = num_queries, decoder_dim, tuple(out_indices)
        self.num_prefix_tokens, self.skip_origin = num_prefix_tokens, skip_origin
        self.project = pointwise_mlp((*[embed_dim] * project_depth, dim), last='hidden')
        self.pos_embed = FourierEmbedding(dim)
        self.query_embed = pointwise_mlp((dim, dim, dim), bias=True, norm=False, last='hidden')
        self.blocks = make_blocks('QueryDecoder', dim, depth, num_heads, mlp_ratio, proj_drop, attn_drop, cross=True)
        self.norm = nn.LayerNorm(dim)
        self.content = self._build_content(content)

    def _build_content(self, content: dict | nn.Module | None) -> nn.Module | None:
        if isinstance(content, dict):
            content = MODELS.build(dict(
                num_points=self.num_queries, in_channels=3 + self.decoder_dim, skip_origin=self.skip_origin,
                widths=(self.decoder_dim, self.decoder_dim)) | content)
        if content is not None and (content.embed_dim, content.num_points) != (self.decoder_dim, self.num_queries):
            raise ValueError(f'QueryDecoder: content gives {content.num_points} places {content.embed_dim} features, '
                             f'{self.num_queries} queries have decoder_dim={self.decoder_dim}')
        return content

    def out_channels(self, embed_dim: int) -> int:
        """Width of the queries."""
        return self.decoder_dim

    def forward(self, features: Sequence[Tensor], coord: Tensor, inputs: dict | Tensor) -> QueryFeatures:
        x, = features
        memory = self.memory(x)
        points = points_of(inputs)[..., :3]
        low, high = points.amin(1), points.amax(1)
        queries, start = self.start(coord, memory)
        pos, query_pos = (self.pos_embed(places, low, high) for places in (coord, queries))
        query_pos = self.query_embed(query_pos.flatten(0, 1)).view(*queries.shape[:2], -1)
        x = self.decode(memory, pos, query_pos, start)
        return QueryFeatures(x, queries, low, high)

    def memory(self, x: Tensor) -> Tensor:
        """The tokens ``(B, L, decoder_dim)`` that queries attend to, of the backbone's ``(B, P + L, embed_dim)``."""
        x = x[:, self.num_prefix_tokens:]
        return self.project(x.flatten(0, 1)).view(*x.shape[:2], -1)

    def start(self, coord: Tensor, memory: Tensor) -> tuple[Tensor, Tensor | None]:
        """Where the queries are, ``(B, Q, 3)``, and what they start from, ``(B, Q, C)`` or ``None`` for zero."""
        if coord.shape[1] < self.num_queries:
            raise ValueError(f'QueryDecoder: num_queries={self.num_queries} queries cannot be at {coord.shape[1]} '
                             'tokens; give the backbone more tokens or the decoder fewer queries')
        if self.content is None:
            return gather(coord, fps(coord, self.num_queries, skip_origin=self.skip_origin)), None
        around = self.content(torch.cat([coord, memory.to(coord.dtype)], -1))
        return around.coord, around.x

    def decode(self, memory: Tensor, pos: Tensor, query_pos: Tensor, start: Tensor | None = None) -> Tensor:
        """The queries behind each block, ``(depth, B, Q, C)``.

        Shape:
            - memory and pos ``(B, L, C)``, query_pos and start ``(B, Q, C)``.
        """
        x, outputs = torch.zeros_like(query_pos) if start is None else start, []
        for block in self.blocks:
            x = block(x, context=memory, context_pos=pos, pos=query_pos)
            outputs.append(self.norm(x))
        return torch.stack(outputs)

    def extra_repr(self) -> str:
        return f'num_queries={self.num_queries}, out_indices={self.out_indices}'
