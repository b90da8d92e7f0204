"""ExFusion (arXiv 2603.27965), a baseline: experts' weights are fused before the one forward."""
import torch
from torch import Tensor, nn

from ewa3d.checks import check_number
from ewa3d.layers.stacked import StackedExperts, add_noise
from ewa3d.registry import MODELS

__all__ = ['FusionFFN', 'FusionWeights']


class FusionWeights(nn.Module):
    """A softmax over E experts, uniform at first."""

    def __init__(self, num_experts: int, device=None, dtype=None):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_experts, device=device, dtype=dtype))

    def forward(self, stacked: Tensor) -> Tensor:
        """``(E, ...)`` to ``(...)``: the weighted sum of the experts; of integers the first one."""
        if not stacked.is_floating_point():
            return stacked[0]
        weights = self.logits.to(stacked.dtype).softmax(0)
        return (weights @ stacked.flatten(1)).view(stacked.shape[1:]) if stacked.ndim > 1 else weights @ stacked


@MODELS.register_module()
class FusionFFN(StackedExperts):
    """E experts whose weights are summed, by a learnable softmax, into the one FFN that every token passes.

    A step costs the plain FFN's products and the sum over the weights. Fusing is that sum, so it is exact. Experts that
    are equal would get equal gradients for ever: they start apart by noise that cancels in their mean, which is the
    plain FFN. Buffers are shared.

    Build it with :meth:`expand`.

    Shape:
        - as the plain FFN, which may be any module.
    """
    averaged = False
    accepts = ('RePaFFN',)

    @classmethod
    def expand(cls, plain: nn.Module, num_experts: int = 4, init_noise_std: float = 0.02) -> 'FusionFFN':
        """Experts around a plain FFN.

        Args:
            plain: any module with at least one parameter.
            num_experts: E, at least 2.
            init_noise_std: standard deviation of noise on trainable experts, with mean zero over them.

        Raises:
            TypeError, ValueError: a number of the wrong kind or out of range.
        """
        check_number('init_noise_std', init_noise_std, '[0, inf)')
        module = cls(plain, num_experts, share_buffers=True)
        like = next(module.parameters())
        module.add_own('fusion', FusionWeights(num_experts, device=like.device, dtype=like.dtype))
        if init_noise_std:
            add_noise(module, init_noise_std)
        return module

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if not args and not kwargs and self.fast:
            return self.run_one(x, lambda name, stacked: self.fusion(stacked))
        return self.run_with(self.mean_tensors(), x, *args, **kwargs)

    def mean_tensors(self) -> dict[int, Tensor]:
        """The fused FFN: ``id`` of a tensor of the body → the weighted sum over its experts."""
        body, found = self.body(), {}
        for name, tensor in (*body.named_parameters(), *body.named_buffers()):
            stacked = self.stacked(name, tensor)
            found[id(tensor)] = tensor if stacked is None else self.fusion(stacked)
        return found

    def fuse(self) -> nn.Module:
        """A module of the plain class with the weighted sum: same keys, dtype, device, mode, ``requires_grad``."""
        with torch.no_grad():
            return self.plain(self.mean_tensors())

    def extra_repr(self) -> str:
        return f'{type(self._plain).__name__}, num_experts={self.num_experts}'
