"""Which query is to find which object: the assignment of least cost."""
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ['match']


def match(cost: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The one-to-one assignment of least total cost (Kuhn 1955; Carion et al. 2020), for each cloud of each layer.

    Args:
        cost: of each query for each object; columns from ``counts[b]`` on are padding.
        counts: objects of each cloud; none is fine.

    Shape:
        - cost ``(D, B, Q, M)``; returns the cloud's number ``d B + b``, the query and the object of each pair, ``(P,)``
          int64 on the device of ``cost``. Pairs are sorted by cloud, then by query.

    Raises:
        ValueError: a cost that is not finite.
    """
    from scipy.optimize import linear_sum_assignment  # scipy is needed here alone
    B = cost.shape[1]
    table = cost.detach().flatten(0, 1).double().cpu().numpy()
    pairs = []
    for i, costs in enumerate(table):
        try:
            queries, objects = linear_sum_assignment(costs[:, :counts[i % B]])
        except ValueError as error:
            raise ValueError(f'the matching costs of cloud {i % B} at decoder layer {i // B} are not finite: the model '
                             f'predicts NaN or infinite values ({error})') from None
        pairs.append(torch.stack([torch.full((len(queries),), i), torch.as_tensor(queries, dtype=torch.int64),
                                  torch.as_tensor(objects, dtype=torch.int64)]))
    return tuple(torch.cat(pairs, 1).to(cost.device))
