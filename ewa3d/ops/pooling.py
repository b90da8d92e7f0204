"""Maximum over the points of a patch, with a backward that does not count in 64-bit integers."""
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ['patch_max']


class _PatchMax(torch.autograd.Function):
    """``amax`` over dim 1. Its own backward in torch turns the mask of maxima into int64 to count ties, which costs
    more than the rest of the mini-PointNet on a CPU; here mask and count stay in the type of the input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        maximum = x.amax(1)
        ctx.save_for_backward(x, maximum)
        return maximum

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        x, maximum = ctx.saved_tensors
        mask = torch.eq(x, maximum.unsqueeze(1), out=torch.empty_like(x))  # (P, K, C), ones at the maxima
        return mask.mul_((grad / mask.sum(1)).unsqueeze(1))


def patch_max(x: Tensor) -> Tensor:
    """The maximum over dim 1; points that tie share the gradient equally, as in ``torch.amax``.

    Under ``torch.compile`` the first of them takes it: a compiler may compute ``x`` anew in the backward, rounded
    otherwise, and then no point equals the maximum.

    Shape:
        - ``(P, K, C)`` to ``(P, C)``.
    """
    if torch.compiler.is_compiling():
        return x.max(1).values
    return _PatchMax.apply(x)
