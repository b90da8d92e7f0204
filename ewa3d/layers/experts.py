"""Experts Weights Averaging (EWA, arXiv 2308.06093): an FFN becomes E of them, trained on a random uniform partition of
the tokens, fused by averaging.

Every parameter keeps the plain FFN's name and gets a leading expert dimension, so loading a plain checkpoint is
"expand the missing dimension" and fusing is a mean.
"""
import copy

import torch
from torch import Tensor, nn

from ewa3d.checks import check_number
from ewa3d.layers.partition import Partition, autocast, scale_grad, uniform_partition
from ewa3d.layers.stacked import StackedExperts, add_noise, check_choice, expert_mean, iter_experts, rows_like
from ewa3d.registry import MODELS

__all__ = ['StackedExperts', 'EWAFFN', 'expert_mean', 'iter_experts']


@MODELS.register_module()
class EWAFFN(StackedExperts):
    """E experts in place of one FFN, each on a random share of the tokens; in eval the FFN of their mean weights.

    Every token passes exactly one expert, without a gate, so a training step costs the products of the plain FFN. The
    plain FFN has to treat every token alone. Its common layouts (timm's ``Mlp``, a ``Sequential`` of linears, layer
    norms, activations and dropouts such as torchvision's ``MLPBlock``) take batched products; any other module runs
    once an expert, and whether it does treat every token alone is tried once, at the first training step.

    Build it with :meth:`expand`. Average the experts after each optimizer step with :func:`ewa3d.attach_ewa`.

    Shape:
        - ``(..., C)`` to ``(..., C')`` as the plain FFN: ``(T, C)``, ``(B, L, C)``, ``(B, H, W, C)``.

    Raises:
        TypeError: in training, an FFN that does not map tokens one by one (channels first, mixing tokens), takes
            other tensors beside the tokens or returns no tensor.
    """

    accepts = ('RePaFFN',)

    def __init__(self, plain: nn.Module, num_experts: int, partition: str, grad_scale: float):
        super().__init__(plain, num_experts)
        self.partition = partition
        self.grad_scale = grad_scale

    @classmethod
    def expand(cls, plain: nn.Module, num_experts: int = 4, partition: str = 'batch', init: str = 'copy',
               init_noise_std: float = 0., expert_grad_scale: str = 'none') -> 'EWAFFN':
        """Experts from a plain FFN.

        Args:
            plain: any module that maps tokens one by one, with at least one parameter.
            num_experts: E, at least 2.
            partition: what one random permutation covers: all tokens of the ``'batch'``, the L positions of a sample,
                ``'shared'`` by the whole batch, or each ``'sample'`` for itself. Where E does not divide L, the latter
                two pad every sample, which costs up to ⌈L/E⌉·E/L of the plain products.
            init: ``'copy'``, or ``'independent'``: experts 1 to E - 1 are drawn anew by the layers' own
                ``reset_parameters``, scaled to the standard deviation that the plain FFN's tensors have.
            init_noise_std: standard deviation of noise added to trainable parameters; its mean over the experts is
                zero, so that the mean expert stays the plain FFN.
            expert_grad_scale: ``'E'`` multiplies the experts' gradients by E in training: each expert sees 1/E of the
                tokens, so under SGD its mean would otherwise move E times slower than the plain FFN.

        Raises:
            TypeError: ``num_experts`` is no integer. ValueError: any other value is not one of the above.
        """
        check_choice('partition', partition, ('batch', 'shared', 'sample'))
        check_choice('init', init, ('copy', 'independent'))
        check_choice('expert_grad_scale', expert_grad_scale, ('none', 'E'))
        check_number('init_noise_std', init_noise_std, '[0, inf)')
        module = cls(plain, num_experts, partition, float(num_experts) if expert_grad_scale == 'E' else 1.)
        if init == 'independent':
            _init_independent(module, plain)
        if init_noise_std:
            add_noise(module, init_noise_std)
        return module

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        plain_call = not args and not kwargs
        if not self.training:
            if plain_call and self.fast:
                return self.run_one(x, _mean_of)
            return self.run_with(self.mean_tensors(), x, *args, **kwargs)
        self.check_shared()
        parts = uniform_partition(x.shape, self.num_experts, self.partition, x.device)
        tokens = x.reshape(-1, x.shape[-1])
        if plain_call and self.fast:
            y = self._run_batched(tokens, parts)
        else:
            self.try_plain(x, args, kwargs)
            y = self._run_each(tokens, parts, x.ndim, args, kwargs)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _run_batched(self, tokens: Tensor, parts: Partition) -> Tensor:
        """A known layout, all experts at once: ``(T, C)`` to ``(T, C')``."""
        if isinstance(next(iter(self._modules.values())), nn.Linear):
            tokens = autocast(tokens)  # before they are gathered, not after
        value = self.stacked if self.grad_scale == 1 else (lambda name, tensor: scale_grad(tensor, self.grad_scale))
        return parts.collect(self.run_batched(parts.dispatch(tokens), value,
                                              lambda layer, y: parts.dispatch(layer(parts.collect(y)))))

    def _run_each(self, tokens: Tensor, parts: Partition, ndim: int, args: tuple, kwargs: dict) -> Tensor:
        """Any FFN, one call an expert on exactly its tokens, as ``(1, ..., m, C)`` with as many dimensions as came."""
        parts, counts = parts.without_padding()
        chunks = parts.dispatch_flat(tokens).split(counts)
        outputs = []
        for expert, chunk in zip(self.expert_tensors(self.grad_scale), chunks):
            if len(chunk) or not len(tokens):  # an expert without tokens gets zero gradients: its tensors are stacked
                y = self.run_with(expert, rows_like(chunk, ndim), *args, **kwargs)
                outputs.append(y.reshape(len(chunk), y.shape[-1]))
        return parts.collect(torch.cat(outputs))

    def extra_repr(self) -> str:
        return f'{type(self._plain).__name__}, num_experts={self.num_experts}, partition={self.partition!r}'


def _mean_of(name: str, stacked: Tensor) -> Tensor:
    return expert_mean(stacked)


@torch.no_grad()
def _init_independent(module: StackedExperts, plain: nn.Module) -> None:
    """Experts from the second on: fresh values of ``reset_parameters``, with the spread of the plain tensors.

    A tensor that is constant in the plain module (a zero bias, a norm's ones) stays so.
    """
    for layer_name, layer in plain.named_modules():
        if layer._parameters and not hasattr(layer, 'reset_parameters'):
            raise ValueError(f"init='independent' needs reset_parameters(), which {layer_name or 'the FFN'} "
                             f'({type(layer).__name__}) does not have; use init=\'copy\' with init_noise_std')
    stacked = dict(module.named_parameters())
    for i in range(1, module.num_experts):
        fresh = copy.deepcopy(plain)
        for layer in fresh.modules():
            if layer._parameters:
                layer.reset_parameters()
        for name, value in fresh.named_parameters():
            if module.stacked(name, stacked[name]) is None:
                continue
            origin = stacked[name][0]
            spread, drawn = origin.float().std(correction=0), value.float().std(correction=0)
            if spread > 0 and drawn > 0:
                stacked[name][i].copy_(value * (spread / drawn))
