"""Momentum contrast: a key network that follows another one slowly, a queue of its outputs, and the losses on them."""
import copy

import torch
import torch.nn.functional as F
from mmengine.dist import all_gather, is_distributed
from torch import Tensor, nn
from torch.func import functional_call

from ewa3d.reparam import Reparam

__all__ = ['KeyNetwork', 'enqueue', 'gather_keys', 'mask_tokens', 'mixed_contrast', 'moco_contrast',
           'plain_parameters']


class KeyNetwork(nn.Module):
    """A plain copy of a masked token model's network, without gradients, that follows it by momentum.

    Its batch norms go by their own statistics. (The scores of codes are not needed for keys; their layer follows too,
    because published checkpoints hold it.)

    Args:
        query: a module with ``backbone``, ``mask_token``, ``lm_head`` and ``cls_head``.

    Shape:
        - center ``(B, G, 3)``, patches ``(B, G, K, 3 + F)``, mask ``(B, G)``; returns ``(B, cls_dim)``.
    """

    def __init__(self, query: nn.Module):
        super().__init__()
        self.backbone = copy.deepcopy(query.backbone)
        self.mask_token = nn.Parameter(query.mask_token.detach().clone())
        self.lm_head = copy.deepcopy(query.lm_head)
        self.cls_head = copy.deepcopy(query.cls_head)
        self.requires_grad_(False)

    def forward(self, center: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
        tokens = self.backbone.tokenizer.embed(center, patches)
        x = self.backbone.encode(mask_tokens(tokens.x, mask, self.mask_token), tokens.pos)
        return self.cls_head(x[:, 0])

    def followed(self, query: nn.Module) -> dict[str, Tensor]:
        """The parameters of ``query`` by the names that they have here, experts as their mean.

        Raises:
            ValueError: what ``query`` was expanded to has no plain form with these names.
        """
        found = plain_parameters(nn.ModuleDict({name: getattr(query, name) for name, _ in self.named_children()}))
        found['mask_token'] = query.mask_token
        theirs, ours = ({name: tuple(value.shape) for name, value in parameters.items()}
                        for parameters in (found, dict(self.named_parameters())))
        for name in sorted({*theirs, *ours}):
            if theirs.get(name) != ours.get(name):
                raise ValueError(f'the momentum network cannot follow the expanded model: momentum.{name} has the '
                                 f'shape {ours.get(name, "no such parameter")}, and the model, fused, '
                                 f'{theirs.get(name, "no such parameter")}; the momentum network stays plain, and '
                                 'rules must fuse to the plain module')
        return found

    @torch.no_grad()
    def keys(self, query: nn.Module, momentum: float, *inputs: Tensor, move: bool) -> Tensor:
        """What :meth:`forward` gives one step nearer to ``query``, where a share ``momentum`` of this network is kept;
        with ``move`` it stays there."""
        followed = {name: value.to(self.mask_token.dtype) for name, value in self.followed(query).items()}
        if move:
            for name, own in self.named_parameters():
                own.lerp_(followed[name], 1 - momentum)
            return self(*inputs)
        moved = {name: own.lerp(followed[name], 1 - momentum) for name, own in self.named_parameters()}
        return functional_call(self, moved, inputs)


def mask_tokens(x: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """``x`` with ``mask_token`` where ``mask`` is True.

    Shape:
        - x ``(B, L, C)``, kept; mask ``(B, L)`` bool; mask_token ``(1, 1, C)``.
    """
    return torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)


@torch.no_grad()
def plain_parameters(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that ``module`` would have if it were fused, by their plain names: of stacked experts the mean.

    Raises:
        ValueError: a module in it does not fuse, so that there is no plain one.
    """
    found = dict(module.named_parameters(recurse=False))
    for name, child in module.named_children():
        while isinstance(child, Reparam):
            fused = child if child.has_fused_form else child.fuse()
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
    return losses[1].lerp(losses[0], ratio.to(query.dtype)).mean()
