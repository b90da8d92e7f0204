"""Momentum contrast: a key network that follows another one slowly, a queue of its outputs, and the losses on them."""
import torch
import torch.nn.functional as F
from mmengine.dist import all_gather, is_distributed
from torch import Tensor, nn

from ewa3d.reparam import Reparam

__all__ = ['enqueue', 'gather_keys', 'mixed_contrast', 'moco_contrast', 'plain_parameters']


@torch.no_grad()
def plain_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that ``module`` would have if it were fused, by their plain names: of stacked experts the mean.

    Raises:
        ValueError: a module in it does not fuse, so that there is no plain one.
    """
    found = dict(module.named_parameters(recurse=False))
    for name, child in module.named_children():
        while isinstance(child, Reparam):
            fused = child.fuse()
            if fused is child:
                raise ValueError(f'{name!r} is a {type(child).__name__}, which does not fuse into a plain module that '
                                 'the momentum network could follow; expand other modules, or by another class')
            child = fused
        found.update({f'{name}.{key}': value for key, value in plain_parameters(child).items()})
    return found


def gather_keys(keys: Tensor) -> Tensor:
    """The keys of all ranks, in their order; one process has its own.

    Shape:
        - ``(B, D)`` to ``(ranks * B, D)``.
    """
    return torch.cat(all_gather(keys.contiguous())) if is_distributed() else keys


def enqueue(queue: Tensor, pointer: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Queue and pointer after ``keys`` took the place of the oldest ones.

    Shape:
        - queue ``(D, K)``, pointer ``(1,)`` int64, keys ``(B, D)`` with ``B <= K``.

    Raises:
        ValueError: more keys than the queue holds.
    """
    size = queue.shape[1]
    if len(keys) > size:
        raise ValueError(f'{len(keys)} keys do not fit into a queue of queue_size={size}; make it at least as long as '
                         'the batch of all processes')
    place = (pointer + torch.arange(len(keys), device=pointer.device)) % size
    return queue.index_copy(1, place, keys.t().to(queue.dtype)), (pointer + len(keys)) % size


def moco_contrast(query: Tensor, keys: Tensor, queue: Tensor, temperature: float = 0.07) -> Tensor:
    """Each query has to find its own key among it and the queue (He et al. 2020).

    Shape:
        - query, keys ``(B, D)`` and the columns of queue ``(D, K)`` are of unit length; returns ``()``.
    """
    positive = (query * keys).sum(-1, keepdim=True)
    scores = torch.cat([positive, query @ queue], 1) / temperature
    return F.cross_entropy(scores, torch.zeros(len(query), dtype=torch.int64, device=query.device))


def mixed_contrast(query: Tensor, keys: Tensor, queue: Tensor, ratio: Tensor, temperature: float = 0.07) -> Tensor:
    """Each query, of a mixture of two clouds, has to find the keys of both: with weight ``ratio`` that of its own cloud
    and with the rest that of the cloud at the mirrored position of the batch, among the keys of the batch and the
    queue (Yu et al. 2022).

    Shape:
        - query, keys ``(B, D)`` and the columns of queue ``(D, K)`` are of unit length; ratio ``(B,)``; returns ``()``.
    """
    scores = torch.cat([query @ keys.t(), query @ queue], 1) / temperature
    own = torch.arange(len(query), device=query.device)
    losses = [F.cross_entropy(scores, target, reduction='none') for target in (own, own.flip(0))]
    return (ratio * losses[0] + (1 - ratio) * losses[1]).mean()
