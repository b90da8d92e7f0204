"""Channel-idle FFNs after training: three linear maps, into which norms and a shortcut around them go."""
import copy

import torch
from torch import Tensor, nn

from ewa3d.reparam import Fused, Reparam

__all__ = ['FoldedFFN', 'check_eval', 'fold']


class FoldedFFN(Fused):
    """What a channel-idle FFN is after training: ``fc2(act(fc1(x))) + skip(x)``.

    Args:
        in_features, out_features: C and C'. active, hidden: how many of the hidden channels are activated. With none
            only ``skip`` is left, and with all of them nothing is idle and there is no such map.
        shortcut: ``x`` is added; part of ``skip`` where there is one.

    Shape:
        - ``(..., C)`` to ``(..., C')``.
    """

    def __init__(self, in_features: int, active: int, hidden: int, out_features: int, act: nn.Module,
                 shortcut: bool = False, device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        whole = active == hidden
        self.shortcut = shortcut and whole
        self.fc1 = nn.Linear(in_features, active, **factory) if active else None
        self.act = act
        self.fc2 = nn.Linear(active, out_features, bias=whole, **factory) if active else None
        self.skip = None if whole else nn.Linear(in_features, out_features, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.fc1 is None:
            return self.skip(x)
        y = self.fc2(self.act(self.fc1(x)))
        if self.skip is not None:
            return y + self.skip(x)
        return x + y if self.shortcut else y


@torch.no_grad()
def fold(ffn: nn.Module, norm: nn.modules.batchnorm._BatchNorm | None = None, scale: Tensor | None = None,
         shortcut: bool = False) -> FoldedFFN:
    """A channel-idle FFN in eval mode as three linear maps; the products are taken in float64.

    Args:
        ffn: a :class:`~ewa3d.layers.repa.RePaFFN`; layers of it that fuse to linear ones (adapters) are
            fused first.
        norm: a batch norm before it. scale: ``(C,)``, a factor for each output channel. shortcut: add the input.

    Raises:
        TypeError: a layer that is no linear one. ValueError: a batch norm without running statistics, a shortcut
            between different widths.
    """
    fc1, fc2, act = _linear(ffn.fc1), _linear(ffn.fc2), ffn.act
    if shortcut and fc1.in_features != fc2.out_features:
        raise ValueError(f'a shortcut needs one width, the FFN maps {fc1.in_features} to {fc2.out_features}')
    first, first_bias = _after_norm(fc1, norm)
    second, second_bias = _after_norm(fc2, None if isinstance(ffn.norm, nn.Identity) else ffn.norm)
    if scale is not None:
        second, second_bias = second * scale.double()[:, None], second_bias * scale.double()
    a, hidden = act.active, fc1.out_features
    folded = FoldedFFN(fc1.in_features, a, hidden, fc2.out_features, copy.deepcopy(act.act), shortcut,
                       device=fc1.weight.device, dtype=fc1.weight.dtype)
    values = {}
    if a:
        values.update({'fc1.weight': first[:a], 'fc1.bias': first_bias[:a], 'fc2.weight': second[:, :a]})
    if a == hidden:
        values['fc2.bias'] = second_bias
    else:
        skip = second[:, a:] @ first[a:]
        values['skip.weight'] = skip + torch.eye(len(skip), dtype=skip.dtype, device=skip.device) if shortcut else skip
        values['skip.bias'] = second[:, a:] @ first_bias[a:] + second_bias
    for name, parameter in folded.named_parameters():
        parameter.copy_(values[name])
        parameter.requires_grad_(fc1.weight.requires_grad)
    return folded.train(ffn.training)


def _linear(layer: nn.Module) -> nn.Linear:
    """A layer of the FFN as the linear one that it fuses to."""
    fused = layer.fuse() if isinstance(layer, Reparam) else layer
    if type(fused).forward is not nn.Linear.forward:
        raise TypeError(f'a channel-idle FFN folds where its layers are linear; one is a {type(layer).__name__}')
    return fused


def _after_norm(linear: nn.Linear, norm) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of a linear map with a batch norm before it."""
    weight = linear.weight.double()
    bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()
    if norm is None:
        return weight, bias
    if norm.running_mean is None:
        raise ValueError('a batch norm without running statistics cannot be folded')
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.double()
    shift = -norm.running_mean.double() * factor
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return weight * factor, weight @ shift + bias


def check_eval(module: nn.Module) -> None:
    """Raise ``ValueError`` for a module in training mode."""
    if module.training:
        raise ValueError(f'{type(module).__name__} cannot be folded in training mode, where batch statistics and '
                         'dropout are something else: call eval() on the model first')
