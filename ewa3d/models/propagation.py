"""Necks that carry token features back to the points of a cloud, for heads that say something about every point."""
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer
from ewa3d.layers.block import Pointwise
from ewa3d.layers.dgcnn import EdgeConv
from ewa3d.layers.tokenizers import points_of
from ewa3d.ops import fps, gather, interpolate, neighbours, patch_max
from ewa3d.registry import MODELS

__all__ = ['FeaturePropagation', 'GraphPropagation', 'PointFeaturePropagation', 'PointFeatures']

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class PointFeatures(NamedTuple):
    """Features of every point of a cloud, and of the cloud, which belong to each of its points as well.

    Shape:
        - x: ``(B, N, C)``.
        - shared: ``(B, D)``, or ``None``.
        - category: ``(B,)`` what the model was told about the clouds, or ``None``.
    """
    x: Tensor
    shared: Tensor | None = None
    category: Tensor | None = None


class FeaturePropagation(nn.Module):
    """Features of a few points at many (Qi et al. 2017): those of the three nearest weighted by inverse distance,
    joined to what the many have themselves, through an MLP with batch norms.

    The first layer's weight is kept as published, its columns in the order ``[shared, own, features]``. It acts on the
    few points before interpolation: the weights of that sum to 1, so the layer's bias and whatever is the same for a
    whole cloud pass through unchanged, and the many points never hold more than the layer's output.

    Args:
        in_channels: width of the features that are carried.
        own_channels: columns that the many points have themselves.
        widths: of the layers.
        num_categories: where given, the cloud's category is ``shared``, as one-hot columns.

    Shape:
        - query ``(B, N, 3)``, own ``(B, N, own_channels)``, points ``(B, S, 3)``, features ``(B, S, in_channels)``,
          category ``(B,)``; returns ``(B, N, widths[-1])``.
    """

    def __init__(self, in_channels: int, own_channels: int, widths: Sequence[int], num_categories: int = 0):
        super().__init__()
        self.columns = num_categories, own_channels, in_channels
        inputs = [sum(self.columns), *widths[:-1]]
        self.mlp_convs = nn.ModuleList(Pointwise(a, b) for a, b in zip(inputs, widths))
        self.mlp_bns = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)

    def forward(self, query: Tensor, own: Tensor, points: Tensor, features: Tensor,
                category: Tensor | None = None) -> Tensor:
        first = self.mlp_convs[0]
        of_category, of_own, of_features = first.weight.split(self.columns, 1)
        carried = F.linear(features, of_features, first.bias)  # (B, S, widths[0])
        if self.columns[0]:
            carried = carried + F.embedding(category, of_category.t()).unsqueeze(1)
        x = interpolate(query, points, carried).flatten(0, 1)  # (B N, widths[0])
        x = x.addmm_(own.flatten(0, 1).to(x.dtype), of_own.t().to(x.dtype))  # in place: a copy costs as much
        x = F.relu(self.mlp_bns[0](x), inplace=True)
        for layer, norm in zip(self.mlp_convs[1:], self.mlp_bns[1:]):
            x = layer(x.view(*own.shape[:2], -1))  # (B, N, width): the shape that has a quick kernel
            x = F.relu(norm(x.flatten(0, 1)), inplace=True)
        return x.view(*own.shape[:2], -1)


class _Propagation(nn.Module):
    """What the necks share: which features they take, how clouds and categories come in."""

    def __init__(self, embed_dim: int | None, out_indices: Sequence[int], num_categories: int | None, in_channels: int,
                 num_prefix_tokens: int):
        super().__init__()
        name = type(self).__name__
        if embed_dim is None:
            raise ValueError(f'{name}: embed_dim is not set (TaskModel fills in its backbone\'s)')
        if num_categories is None:
            raise ValueError(f'{name}: num_categories is not set. tools/train.py fills it in from the class names of '
                             'the training set; 0 makes a model that is not told the category')
        if not isinstance(out_indices, Sequence) or isinstance(out_indices, str) or not out_indices:
            raise ValueError(f'{name}: out_indices must name blocks, such as (3, 7, 11), got {out_indices!r}')
        for key, value, least in (('embed_dim', embed_dim, 1), ('num_categories', num_categories, 0),
                                  ('in_channels', in_channels, 3)):
            check_integer(f'{name}: {key}', value, least)
        self.embed_dim, self.in_channels, self.num_categories = embed_dim, in_channels, num_categories
        self.out_indices = tuple(out_indices)
        self.num_prefix_tokens = num_prefix_tokens

    def points_and_category(self, inputs: Mapping | Tensor) -> tuple[Tensor, Tensor | None]:
        """The cloud ``(B, N, in_channels)`` and the categories ``(B,)`` int64 of the inputs.

        Raises:
            KeyError, TypeError, ValueError: they are not there, of another shape or type, or out of range (looked at
                on a CPU only).
        """
        points = points_of(inputs)
        if points.ndim != 3 or points.shape[-1] != self.in_channels:
            raise ValueError(f'points must have the shape (B, N, {self.in_channels}), got {tuple(points.shape)}')
        if not self.num_categories:
            return points, None
        if not isinstance(inputs, Mapping) or 'category' not in inputs:
            raise KeyError("the model is told the category of each cloud: inputs must be dict(points=…, "
                           "category=(B,)); in a pipeline, dict(type='Pack', category=True)")
        wanted = f'category must be one integer a cloud, ({points.shape[0]},)'
        try:
            category = torch.as_tensor(inputs['category'], device=points.device)
        except (TypeError, ValueError, RuntimeError) as error:  # None, names, ragged lists
            raise TypeError(f'{wanted}, got {inputs["category"]!r}: {error}') from None
        if category.dtype not in INTEGERS or category.shape != points.shape[:1]:
            raise ValueError(f'{wanted}, got {category.dtype} of the shape {tuple(category.shape)}')
        category = category.long()
        if category.device.type == 'cpu' and not torch.compiler.is_compiling() and len(category) and not \
                0 <= int(category.min()) <= int(category.max()) < self.num_categories:
            raise ValueError(f'category has values outside of the {self.num_categories} categories, 0 … '
                             f'{self.num_categories - 1}: {category.tolist()}')
        return points, category

    def patches(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The features without the tokens that are no patches."""
        return [x[:, self.num_prefix_tokens:] for x in features]

    def extra_repr(self) -> str:
        return f'out_indices={self.out_indices}, num_categories={self.num_categories}'


@MODELS.register_module()
class PointFeaturePropagation(_Propagation):
    """Point-MAE's way from tokens to points: the features of several blocks side by side, carried to all points at
    once; beside them, the same for all points of a cloud, their maximum and mean and an embedding of its category.

    Args:
        embed_dim, in_channels, num_prefix_tokens: the backbone's; ``TaskModel`` fills them in. ``in_channels`` is 3
            and the number of extra features (normals), which join the coordinates of each point.
        out_indices: the blocks whose features are taken.
        hidden: width of the propagation's first layer; four times ``embed_dim`` by default.
        out_dim: of its second.
        num_categories: of the clouds; 0 for a model that is not told.
        category_dim: width of the category's embedding.

    Shape:
        - features: tuple of ``(B, num_prefix_tokens + L, embed_dim)``; coord ``(B, L, 3)``; inputs
          ``dict(points=(B, N, in_channels), category=(B,))``.
        - returns :class:`PointFeatures` with ``out_channels()`` channels in all.

    Raises:
        KeyError, TypeError, ValueError: settings, clouds or categories that cannot be.
    """

    def __init__(self, embed_dim: int | None = None, out_indices: Sequence[int] = (3, 7, 11),
                 hidden: int | None = None, out_dim: int = 1024, num_categories: int | None = None,
                 category_dim: int = 64, in_channels: int = 3, num_prefix_tokens: int = 0):
        super().__init__(embed_dim, out_indices, num_categories, in_channels, num_prefix_tokens)
        for name, value in (('hidden', hidden or 1), ('out_dim', out_dim), ('category_dim', category_dim)):
            check_integer(f'PointFeaturePropagation: {name}', value, 1)
        joined = len(out_indices) * embed_dim
        if num_categories:
            self.label_conv = nn.Sequential(Pointwise(num_categories, category_dim, bias=False),
                                            nn.BatchNorm1d(category_dim), nn.LeakyReLU(0.2))
        self.propagation_0 = FeaturePropagation(joined, in_channels, (hidden or 4 * embed_dim, out_dim))
        self._channels = out_dim + 2 * joined + (category_dim if num_categories else 0)

    def out_channels(self, embed_dim: int | None = None) -> int:
        """Width of the result, of points and clouds together."""
        return self._channels

    def forward(self, features: Sequence[Tensor], coord: Tensor, inputs: Mapping | Tensor) -> PointFeatures:
        points, category = self.points_and_category(inputs)
        joined = torch.cat(self.patches(features), -1)  # (B, L, n C)
        shared = [patch_max(joined), joined.mean(1)]
        if category is not None:
            linear, norm, act = self.label_conv
            shared.append(act(norm(F.embedding(category, linear.weight.t()))))
        x = self.propagation_0(points[..., :3], points, coord, joined)
        return PointFeatures(x, torch.cat(shared, -1), category)


@MODELS.register_module()
class GraphPropagation(_Propagation):
    """Point-BERT's way from tokens to points, in steps: features of an early, a middle and the last block are carried
    to two sets of farthest points, each set is refined by edge convolutions with the one below it, and the larger one
    is carried to all points.

    Args:
        embed_dim, in_channels, num_prefix_tokens, skip_origin: the backbone's; ``TaskModel`` fills them in.
        out_indices: three blocks, the earliest first.
        fps_levels: how many points the two sets have, the larger first.
        num_neighbours: of the edge convolutions.
        hidden: width of the propagations' first layer; four times ``embed_dim`` by default.
        graph_dim: width of the first edge convolutions.
        num_categories: of the clouds; 0 for a model that is not told.

    Shape, Raises:
        as :class:`PointFeaturePropagation`; there is no ``shared``.
    """

    def __init__(self, embed_dim: int | None = None, out_indices: Sequence[int] = (3, 7, 11),
                 fps_levels: Sequence[int] = (512, 256), num_neighbours: int = 4, hidden: int | None = None,
                 graph_dim: int = 512, num_categories: int | None = None, in_channels: int = 3,
                 num_prefix_tokens: int = 0, skip_origin: bool = False):
        super().__init__(embed_dim, out_indices, num_categories, in_channels, num_prefix_tokens)
        if len(self.out_indices) != 3:
            raise ValueError(f'GraphPropagation: out_indices must name three blocks, got {self.out_indices}')
        if len(fps_levels) != 2 or fps_levels[0] < fps_levels[1]:
            raise ValueError('GraphPropagation: fps_levels must be two numbers of points, the larger first, got '
                             f'{tuple(fps_levels)}')
        for name, value in (('each of fps_levels', fps_levels[1]), ('num_neighbours', num_neighbours),
                            ('hidden', hidden or 1), ('graph_dim', graph_dim)):
            check_integer(f'GraphPropagation: {name}', value, 1)
        self.fps_levels, self.num_neighbours, self.skip_origin = tuple(fps_levels), num_neighbours, skip_origin
        widths = (hidden or 4 * embed_dim, embed_dim)
        self.propagation_2 = FeaturePropagation(embed_dim, 3, widths)
        self.propagation_1 = FeaturePropagation(embed_dim, 3, widths)
        self.propagation_0 = FeaturePropagation(embed_dim, in_channels, widths, num_categories)
        self.dgcnn_pro_1 = _GraphUpsampling(embed_dim, graph_dim, num_neighbours)
        self.dgcnn_pro_2 = _GraphUpsampling(embed_dim, graph_dim, num_neighbours)

    def out_channels(self, embed_dim: int | None = None) -> int:
        """Width of the result."""
        return self.embed_dim

    def levels(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The two sets of farthest points: the smaller one is the beginning of the larger."""
        num, fewer = self.fps_levels
        if points.shape[1] < num:
            raise ValueError(f'GraphPropagation: fps_levels={self.fps_levels} cannot be picked from '
                             f'{points.shape[1]} points')
        many = gather(points, fps(points, num, skip_origin=self.skip_origin))
        return many, many[:, :fewer]

    def forward(self, features: Sequence[Tensor], coord: Tensor, inputs: Mapping | Tensor) -> PointFeatures:
        points, category = self.points_and_category(inputs)
        xyz = points[..., :3]
        early, middle, last = self.patches(features)
        many, few = self.levels(xyz)
        x = self.dgcnn_pro_2(last, coord, self.propagation_2(few, few, coord, middle), few)
        x = self.dgcnn_pro_1(x, few, self.propagation_1(many, many, coord, early), many)
        return PointFeatures(self.propagation_0(xyz, points, many, x, category), None, category)


class _GraphUpsampling(nn.Module):
    """Two edge convolutions: from each point of a larger set to its neighbours in a smaller one, then in its own.

    Shape:
        - below ``(B, S, C)`` at ``(B, S, 3)``, x ``(B, M, C)`` at points ``(B, M, 3)``; returns ``(B, M, C)``.
    """

    def __init__(self, width: int, hidden: int, num_neighbours: int):
        super().__init__()
        self.num_neighbours = num_neighbours
        self.layer1 = EdgeConv(width, hidden)
        self.layer2 = EdgeConv(hidden, width)

    def forward(self, below: Tensor, coord: Tensor, x: Tensor, points: Tensor) -> Tensor:
        x = self.layer1(below, neighbours(points, coord, self.num_neighbours), x)
        return self.layer2(x, neighbours(points, points, self.num_neighbours))
