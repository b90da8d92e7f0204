"""Top-k routing: which experts see a token, with what weight, and in which slots.

All shapes follow from the number of tokens and the capacity, so that routes compile and wait for no device.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['Choice', 'Router', 'Routes', 'balance_loss', 'capacity_of', 'combine', 'route', 'router_z_loss']


class Choice(NamedTuple):
    """What a router says of T tokens.

    Shape:
        - logits, probs ``(T, E)`` in float32 or float64; experts ``(T, k)`` int64, the best first; gates ``(T, k)``.
    """
    logits: Tensor
    probs: Tensor
    experts: Tensor
    gates: Tensor


class Router(nn.Module):
    """A linear map of a token to one logit an expert, in float32 at least, and the choice of the k best.

    Args:
        in_features: C, the width of the tokens.
        num_experts: E. top_k: k, at most E.
        renorm: the gates of the chosen sum to one (experts that are alike then give what one of them gives); otherwise
            they are the softmax over all E experts.

    Shape:
        - ``(T, C)`` to a :class:`Choice`.

    Raises:
        ValueError: tokens of another width.
    """

    def __init__(self, in_features: int, num_experts: int, top_k: int, renorm: bool = True, device=None, dtype=None):
        super().__init__()
        self.top_k = top_k
        self.renorm = renorm
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device, dtype=dtype))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Choice:
        if tokens.shape[-1] != self.weight.shape[1]:
            raise ValueError(f'the router takes tokens of width {self.weight.shape[1]}, got {tuple(tokens.shape)}; '
                             'its keyword in_features sets the width')
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        with torch.autocast(tokens.device.type, enabled=False):
            logits = F.linear(tokens.to(dtype), self.weight.to(dtype))
        probs = logits.softmax(-1)
        gates, experts = probs.topk(self.top_k, -1)
        return Choice(logits, probs, experts, gates / gates.sum(-1, keepdim=True) if self.renorm else gates)

    def extra_repr(self) -> str:
        experts, width = self.weight.shape
        return f'{width}, num_experts={experts}, top_k={self.top_k}, renorm={self.renorm}'


class Routes(NamedTuple):
    """The k choices of T tokens in the S = E·M slots of E experts; a choice that found no slot is dropped.

    Shape:
        - slot ``(T, k)`` int64: the slot of each choice, S where it was dropped.
        - item ``(S,)`` int64: the choice ``t * k + j`` in each slot, T·k where the slot is empty.
    """
    slot: Tensor
    item: Tensor
    num_experts: int

    @property
    def capacity(self) -> int:
        """M, the slots of each expert."""
        return len(self.item) // self.num_experts

    def dispatch(self, tokens: Tensor) -> Tensor:
        """``(T, C)`` to ``(E, M, C)``; empty slots are zero."""
        return _Dispatch.apply(tokens, self.slot, self.item).view(self.num_experts, self.capacity, tokens.shape[-1])

    def collect(self, slots: Tensor) -> Tensor:
        """``(E, M, C)`` back to ``(T, k, C)``; zero where a choice was dropped."""
        return _Collect.apply(slots.reshape(len(self.item), slots.shape[-1]), self.slot, self.item)

    def counts(self) -> Tensor:
        """``(E,)``: the slots of each expert that hold a token."""
        return (self.item.view(self.num_experts, self.capacity) < self.slot.numel()).sum(1)


def capacity_of(tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """The slots of an expert: its share of the choices times ``factor``, at least one and at most all tokens."""
    return min(tokens, max(1, math.ceil(factor * tokens * top_k / num_experts)))


def route(experts: Tensor, num_experts: int, capacity: int) -> Routes:
    """Slots for choices of experts: all first choices come before all second ones, and tokens in their order.

    Args:
        capacity: the slots of each expert.

    Shape:
        - experts ``(T, k)`` int64; a token's k experts differ.
    """
    (count, top_k), size = experts.shape, num_experts * capacity
    choices = experts.t().reshape(-1)  # (k T): first choices first
    taken = F.one_hot(choices, num_experts)
    rank = ((taken.cumsum(0) - 1) * taken).sum(1)  # how many chose the same expert before
    slot = torch.where(rank < capacity, choices * capacity + rank, size).view(top_k, count).t().contiguous()
    item = torch.full((size + 1,), count * top_k, device=slot.device)  # the last slot takes the dropped ones
    item.scatter_(0, slot.reshape(-1), torch.arange(count * top_k, device=slot.device))
    return Routes(slot, item[:size], num_experts)


def combine(rows: Tensor, gates: Tensor) -> Tensor:
    """The choices of each token, weighed: summed in the gates' precision, of the rows' dtype.

    Shape:
        - rows ``(T, k, C)``, gates ``(T, k)``; returns ``(T, C)``.
    """
    return (rows * gates.unsqueeze(-1)).sum(1).to(rows.dtype)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows by number, zeros for the number behind the last one."""
    if not len(rows):
        return rows.new_zeros(*index.shape, rows.shape[-1])
    taken = rows.index_select(0, index.reshape(-1).clamp(max=len(rows) - 1))
    return taken.masked_fill_((index.reshape(-1) == len(rows)).unsqueeze(-1), 0).view(*index.shape, rows.shape[-1])


class _Dispatch(torch.autograd.Function):
    """Tokens to slots; its gradient is a gather too, where autograd would add into zeros."""

    @staticmethod
    def forward(tokens, slot, item):
        return _take(tokens, item.div(slot.shape[1], rounding_mode='floor'))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return _take(grad, ctx.saved_tensors[0]).sum(1), None, None


class _Collect(torch.autograd.Function):
    """Slots to choices."""

    @staticmethod
    def forward(slots, slot, item):
        return _take(slots, slot)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        return _take(grad.flatten(0, 1), ctx.saved_tensors[0]), None, None


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------
def balance_loss(choice: Choice) -> Tensor:
    """``E Σ f_i p_i`` (Fedus et al. 2022): f is the share of all choices that fell on an expert, p its mean
    probability. One where the load is uniform."""
    tokens, num_experts = choice.probs.shape
    mean = choice.probs.sum(0) / max(tokens, 1)
    return num_experts * (load_of(choice) * mean).sum()


def load_of(choice: Choice) -> Tensor:
    """``(E,)``: the share of all choices that fell on each expert, before any was dropped."""
    hits = F.one_hot(choice.experts.reshape(-1), choice.probs.shape[1]).sum(0)
    return hits.to(choice.probs.dtype) / max(choice.experts.numel(), 1)


def router_z_loss(choice: Choice) -> Tensor:
    """The mean square of log Σ exp of the logits (Zoph et al. 2022)."""
    return choice.logits.logsumexp(-1).square().sum() / max(len(choice.logits), 1)
