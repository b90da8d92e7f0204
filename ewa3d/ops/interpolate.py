"""Features of some points carried to others: the mean of the nearest ones, weighted by inverse distance."""
import torch
import torch.nn.functional as F
from torch import Tensor

from ewa3d.ops.points import exporting, knn

__all__ = ['interpolate', 'interpolation_weights']

EPSILON = 1e-8  # as published: what is added to a squared distance


def interpolate(query: Tensor, points: Tensor, features: Tensor, k: int = 3) -> Tensor:
    """``features`` of ``points`` at ``query`` (Qi et al. 2017): the sum over the ``k`` nearest points of their
    features, weighted by ``1 / (d² + 1e-8)`` and divided by the sum of the weights.

    A cloud of fewer than ``k`` points gives all that it has. Differentiable with respect to the features and, where
    they ask for it, the coordinates.

    Shape:
        - query ``(B, N, 3)``, points ``(B, S, 3)``, features ``(B, S, C)``; returns ``(B, N, C)`` in the dtype of the
          features.

    Raises:
        TypeError, ValueError: shapes that do not fit each other, no points, coordinates that are not finite.
    """
    if features.ndim != 3 or features.shape[:2] != points.shape[:2]:
        raise ValueError(f'interpolate: points (B, S, 3) and their features (B, S, C) expected, got '
                         f'{tuple(points.shape)} and {tuple(features.shape)}')
    index, weight = interpolation_weights(query, points, k)
    return weighted_sum(features, index, weight)


def interpolation_weights(query: Tensor, points: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Which points :func:`interpolate` looks at, nearest first, and how much each one counts.

    Shape:
        - query ``(B, N, 3)``, points ``(B, S, 3)``; returns indices ``(B, N, min(k, S))`` int64 and weights of that
          shape, which sum to 1, in the dtype of ``points`` (half precision: float32).

    Raises:
        TypeError, ValueError: as :func:`interpolate`.
    """
    if points.ndim == 3 and points.shape[1] == 0:
        raise ValueError(f'interpolate: there is no point to take features from: points is {tuple(points.shape)}')
    dtype = torch.promote_types(points.dtype, torch.float32)
    distance, index = knn(query.to(dtype), points.to(dtype), min(k, points.shape[1]))
    # The optimizer of ONNX graphs takes 1e-8 for 0 and drops it; the sum of the weights is divided out.
    weight = ((distance / EPSILON + 1) if exporting() else (distance + EPSILON)).reciprocal()
    return index, weight / weight.sum(-1, keepdim=True)


def weighted_sum(features: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``sum_j weight[b, n, j] · features[b, index[b, n, j]]`` without the ``(B, N, k, C)`` that gathering would make.

    Where a matrix of all pairs is no larger than the result, half precision, other devices and exported graphs multiply
    by that: they are quick at products. The rest are sums of rows.

    Shape:
        - features ``(B, S, C)``, index and weight ``(B, N, k)``; returns ``(B, N, C)``.
    """
    B, S, C = features.shape
    weight = weight.to(features.dtype)
    low_precision = features.dtype in (torch.float16, torch.bfloat16)
    if (S <= C and (features.device.type != 'cpu' or low_precision)) or exporting():
        return weight.new_zeros(*index.shape[:2], S).scatter(2, index, weight) @ features
    rows = index + torch.arange(B, device=index.device).mul(S).view(B, 1, 1)
    total = F.embedding_bag(rows.flatten(0, 1), features.reshape(B * S, C), mode='sum',
                            per_sample_weights=weight.flatten(0, 1))
    return total.view(*index.shape[:2], C)
