"""A random uniform partition of tokens, and products of stacked weights: what layers with experts are made of."""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ['Partition', 'uniform_partition', 'expert_linear', 'expert_layer_norm', 'autocast', 'scale_grad']


class Partition(NamedTuple):
    """T tokens in the S = E·M slots of E experts: each token has one slot, the S - T slots left over are padding.

    ``order`` is a permutation of 0 … S - 1 that tells what sits in each slot, expert by expert: a token below T, and
    padding from T on. ``inverse`` is the slot of each of them. All shapes follow from T and E alone, so that nothing
    waits for the device, and both ways and their gradients are gathers.

    Shape:
        - order, inverse: ``(S,)`` int64.
    """
    order: Tensor
    inverse: Tensor
    num_tokens: int
    num_experts: int

    def table(self) -> Tensor:
        """``(E, M)``: the slots of each expert."""
        return self.order.view(self.num_experts, -1)

    def dispatch(self, tokens: Tensor) -> Tensor:
        """``(T, C)`` to ``(E, M, C)``; padding is zero."""
        return self.dispatch_flat(tokens).view(self.num_experts, -1, tokens.shape[-1])

    def dispatch_flat(self, tokens: Tensor) -> Tensor:
        """``(T, C)`` to ``(S, C)``."""
        return _Spread.apply(tokens, self.order, self.inverse)

    def collect(self, slots: Tensor) -> Tensor:
        """``(E, M, C)`` or ``(S, C)`` back to ``(T, C)``; what came out of padding is dropped."""
        return _Collect.apply(slots.reshape(len(self.order), slots.shape[-1]), self.order, self.inverse,
                              self.num_tokens)

    def without_padding(self) -> tuple['Partition', list[int]]:
        """The same partition with T slots, and how many each expert has. Waits for the device if there is padding."""
        if len(self.order) == self.num_tokens:
            return self, [self.num_tokens // self.num_experts] * self.num_experts
        real = self.order < self.num_tokens
        order = self.order[real]
        return (Partition(order, _invert(order), self.num_tokens, self.num_experts),
                real.view(self.num_experts, -1).sum(1).tolist())


def uniform_partition(shape: tuple[int, ...], num_experts: int, scope: str = 'batch',
                      device: torch.device | str | None = None) -> Partition:
    """Cut a random permutation of the tokens into ``num_experts`` parts whose sizes differ by at most one.

    Which experts get one token less is random too, so none is favoured. The randomness is torch's default generator
    of the device: a seed, a resume and activation checkpointing reproduce it.

    Args:
        shape: of the tokens, ``(..., C)``.
        scope: ``'batch'`` permutes all tokens; with three or more dimensions, ``'shared'`` and ``'sample'`` permute the
            tokens of each first index, alike for all or each for itself (sizes are uniform for each, then).
    """
    tokens = math.prod(shape[:-1])
    rows = shape[0] if scope != 'batch' and len(shape) > 2 else 1
    length = math.prod(shape[1:-1]) if rows != 1 else tokens
    draws = rows if scope == 'sample' else 1
    size = -(-length // num_experts)
    padding = size * num_experts - length
    order = _permutations(draws, length, device)
    if padding:  # the last round of dealing: tokens and padding fall to random experts
        full = length - (num_experts - padding)
        last = torch.cat([order[:, full:], torch.arange(length, length + padding, device=device).expand(draws, -1)], 1)
        last = last.gather(1, _permutations(draws, num_experts, device))
        order = torch.cat([order[:, :full], last], 1)
    order = order.view(draws, size, num_experts)
    if rows != 1:
        row = torch.arange(rows, device=device).view(-1, 1, 1)
        order = torch.where(order < length, order + row * length, order - length + tokens + row * padding)
    order = order.permute(2, 0, 1).reshape(-1)  # (E, rows, size)
    return Partition(order, _invert(order), tokens, num_experts)


def _permutations(count: int, length: int, device) -> Tensor:
    """``(count, length)``: a random permutation a row."""
    if count == 1:
        return torch.randperm(length, device=device)[None]
    return torch.rand(count, length, device=device).argsort(1)


def _invert(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _spread(tokens: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Tokens to their slots, zeros to padding."""
    count = len(tokens)
    if count == len(order):
        return tokens.index_select(0, order)
    return tokens.index_select(0, order.clamp(max=count - 1)).index_fill_(0, inverse[count:], 0)


def _collect(slots: Tensor, inverse: Tensor, count: int) -> Tensor:
    return slots.index_select(0, inverse[:count])


class _Spread(torch.autograd.Function):
    """:func:`_spread`; its gradient is a gather as well, where autograd would add into zeros."""

    @staticmethod
    def forward(tokens, order, inverse):
        return _spread(tokens, order, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.count = len(inputs[0])
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, grad):
        return _collect(grad, ctx.saved_tensors[0], ctx.count), None, None


class _Collect(torch.autograd.Function):
    """:func:`_collect`, the transpose of :class:`_Spread`."""

    @staticmethod
    def forward(slots, order, inverse, count):
        return _collect(slots, inverse, count)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1], inputs[2])

    @staticmethod
    def backward(ctx, grad):
        return _spread(grad, *ctx.saved_tensors), None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------
def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One linear map an expert, as one batched product; computed in autocast's dtype where that is on.

    Shape:
        - x ``(E, M, C)``, weight ``(E, H, C)``, bias ``(E, H)``; returns ``(E, M, H)``.
    """
    return _ExpertLinear.apply(autocast(x), autocast(weight), None if bias is None else autocast(bias))


class _ExpertLinear(torch.autograd.Function):
    """A batched linear map whose gradients are written in the layout of the weights.

    With E FFNs to read and write, copies of weights are what a step with experts costs. Autograd of the product with
    a transposed weight would give a transposed gradient, to be copied once more; a loop over experts would stack their
    gradients. On two busy cores the loop took up to three times as long, in one thread as long or longer.
    """

    @staticmethod
    def forward(x, weight, bias):
        if bias is None:
            return torch.bmm(x, weight.mT)
        return torch.baddbmm(bias[:, None], x, weight.mT)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        return (torch.bmm(grad, weight) if needs[0] else None,
                torch.bmm(grad.mT, x) if needs[1] else None,
                grad.sum(1) if needs[2] else None)


def expert_layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None,
                      eps: float) -> Tensor:
    """One layer norm an expert.

    Shape:
        - x ``(E, M, H)``, weight and bias ``(E, H)``; returns ``(E, M, H)``.
    """
    x = F.layer_norm(x, shape, eps=eps)
    if weight is not None:
        x = x * weight[:, None]
    return x if bias is None else x + bias[:, None]


def autocast(operand: Tensor) -> Tensor:
    """An operand of a product as autocast would cast it where it is on (float64 stays).

    Shape:
        - any; kept.
    """
    kind = operand.device.type
    if not torch.is_autocast_enabled(kind) or operand.dtype == torch.float64:
        return operand
    return operand.to(torch.get_autocast_dtype(kind))


class _ScaleGrad(torch.autograd.Function):
    @staticmethod
    def forward(x, factor):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def scale_grad(x: Tensor, factor: float) -> Tensor:
    """``x`` itself, with its gradient times ``factor``.

    Shape:
        - any; kept.
    """
    return x if factor == 1 else _ScaleGrad.apply(x, factor)
