"""Stacked experts: an FFN becomes E of them, trained on a random uniform partition of the tokens, fused by averaging.

Experts Weights Averaging (EWA, arXiv 2308.06093). Every parameter keeps the plain FFN's name and gets a leading
expert dimension, so loading a plain checkpoint is "expand the missing dimension" and fusing is a mean.
"""
import copy
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.partition import Partition, autocast, expert_layer_norm, expert_linear, scale_grad, uniform_partition
from ewa3d.layers.standin import run_with
from ewa3d.registry import MODELS, nearest
from ewa3d.reparam import Reparam

__all__ = ['StackedExperts', 'EWAFFN', 'expert_mean', 'iter_experts']


class StackedExperts(Reparam):
    """E copies of a plain module, held as one module of its class whose tensors have a leading dimension E.

    ``self._plain`` is a module of the plain class that is not registered: it shares the dictionaries of parameters,
    buffers and children with ``self``. So the state dict has the plain names, ``to()``, ``train()``, ``deepcopy`` and
    pickling need no care, and :func:`~ewa3d.layers.standin.run_with` runs its forward with any expert's tensors.
    Hooks on modules below the plain one stay with the copies and then run once an expert.

    Args:
        plain: the module to multiply; it is copied.
        num_experts: E, at least 2.
    """

    def __init__(self, plain: nn.Module, num_experts: int):
        super().__init__()
        _check_plain(plain)
        self.num_experts = check_integer('num_experts', num_experts, 2)
        memo = {}  # deepcopy takes these for the copies, so tied tensors stay tied
        for tensor in _tensors(plain).values():
            memo[id(tensor)] = _like(tensor, tensor.detach()[None].repeat(num_experts, *[1] * tensor.ndim))
        body = copy.deepcopy(plain, memo)
        for hooks in ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'):
            body.__dict__[hooks] = type(body.__dict__[hooks])()  # those of the module itself move with expand()
        self.training = plain.training
        self.__dict__['_plain'] = body
        for shared in ('_parameters', '_buffers', '_modules', '_non_persistent_buffers_set'):
            self.__dict__[shared] = body.__dict__[shared]

    def train(self, mode: bool = True):
        self._plain.training = mode
        return super().train(mode)

    def expert_parameters(self) -> list[nn.Parameter]:
        """Every parameter whose leading dimension is the experts', tied ones once."""
        return list(self.parameters())

    def mean_tensors(self) -> dict[int, Tensor]:
        """The mean expert, what eval mode computes with and :meth:`fuse` returns: ``id`` of a stacked tensor → mean."""
        return {id(tensor): expert_mean(tensor) for tensor in _tensors(self).values()}

    def expert_tensors(self, grad_scale: float = 1.) -> list[dict[int, Tensor]]:
        """Each expert: ``id`` of a stacked tensor → the expert's view into it."""
        slices = {id(t): (scale_grad(t, grad_scale) if t.requires_grad else t).unbind(0)
                  for t in _tensors(self).values()}
        return [{key: views[i] for key, views in slices.items()} for i in range(self.num_experts)]

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """A module of the plain class with the experts' mean: same keys, dtype, device, mode, ``requires_grad``."""
        means, tensors = self.mean_tensors(), _tensors(self).values()
        memo = {id(tensor): _like(tensor, means[id(tensor)]) for tensor in tensors}
        return copy.deepcopy(self._plain, memo)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs):
        """A plain checkpoint loads into every expert; one with another number of experts is an error."""
        # Keys of older releases are renamed by the plain class; without tensors that is all that its loader does.
        empty = object.__new__(type(self._plain))
        empty.__dict__.update(self._plain.__dict__, _parameters={}, _buffers={})
        empty._load_from_state_dict(state_dict, prefix, local_metadata, False, [], [], [])
        for name, own in _tensors(self, remove_duplicate=False).items():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or value.shape == own.shape:
                continue
            if value.shape == own.shape[1:]:
                state_dict[prefix + name] = value.detach()[None].repeat(self.num_experts, *[1] * value.ndim)
            elif value.ndim == own.ndim and value.shape[1:] == own.shape[1:]:
                error_msgs.append(f'{prefix + name} has {len(value)} experts in the checkpoint, the model has '
                                  f'{self.num_experts}: build it with num_experts={len(value)}, or load fused weights')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                      error_msgs)


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

    def __init__(self, plain: nn.Module, num_experts: int, partition: str, grad_scale: float):
        super().__init__(plain, num_experts)
        self.partition = partition
        self.grad_scale = grad_scale
        self._tried = False

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
        _check_choice('partition', partition, ('batch', 'shared', 'sample'))
        _check_choice('init', init, ('copy', 'independent'))
        _check_choice('expert_grad_scale', expert_grad_scale, ('none', 'E'))
        check_number('init_noise_std', init_noise_std, '[0, inf)')
        module = cls(plain, num_experts, partition, float(num_experts) if expert_grad_scale == 'E' else 1.)
        if init == 'independent':
            _init_independent(module, plain)
        if init_noise_std:
            _add_noise(module, init_noise_std)
        return module

    @property
    def fast(self) -> bool:
        """Whether all experts run at once; looked up each time, since hooks and layers may have been put in."""
        return _known_layout(self._plain)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        plain_call = not args and not kwargs
        if not self.training:
            if plain_call and self.fast:
                return self._run_mean(x)
            return run_with(self._plain, self.mean_tensors(), x, *args, **kwargs)
        parts = uniform_partition(x.shape, self.num_experts, self.partition, x.device)
        tokens = x.reshape(-1, x.shape[-1])
        if plain_call and self.fast:
            y = self._run_batched(tokens, parts)
        else:
            self._try(x, args, kwargs)
            y = self._run_each(tokens, parts, x.ndim, args, kwargs)
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def _run_mean(self, x: Tensor) -> Tensor:
        """A known layout with the mean expert's tensors."""
        for layer in self._modules.values():
            if isinstance(layer, (nn.Linear, nn.LayerNorm)):
                weight, bias = (t if t is None else expert_mean(t) for t in (layer.weight, layer.bias))
                x = F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else \
                    F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
            else:
                x = layer(x)
        return x

    def _run_batched(self, tokens: Tensor, parts: Partition) -> Tensor:
        """A known layout, all experts at once: ``(T, C)`` to ``(T, C')``."""
        layers = list(self._modules.values())
        if isinstance(layers[0], nn.Linear):
            tokens = autocast(tokens)  # before they are gathered, not after
        y = parts.dispatch(tokens)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                y = expert_linear(y, *self._scaled(layer))
            elif isinstance(layer, nn.LayerNorm):
                y = expert_layer_norm(y, layer.normalized_shape, *self._scaled(layer), layer.eps)
            else:
                y = layer(y)
        return parts.collect(y)

    def _scaled(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        weight, bias = layer.weight, layer.bias
        if self.grad_scale == 1:
            return weight, bias
        return tuple(t if t is None else scale_grad(t, self.grad_scale) for t in (weight, bias))

    def _run_each(self, tokens: Tensor, parts: Partition, ndim: int, args: tuple, kwargs: dict) -> Tensor:
        """Any FFN, one call an expert on exactly its tokens, as ``(1, ..., m, C)`` with as many dimensions as came."""
        parts, counts = parts.without_padding()
        chunks = parts.dispatch_flat(tokens).split(counts)
        outputs = []
        for expert, chunk in zip(self.expert_tensors(self.grad_scale), chunks):
            if len(chunk) or not len(tokens):  # an expert without tokens gets zero gradients: its tensors are stacked
                y = run_with(self._plain, expert, _rows(chunk, ndim), *args, **kwargs)
                outputs.append(y.reshape(len(chunk), y.shape[-1]))
        return parts.collect(torch.cat(outputs))

    @torch.no_grad()
    def _try(self, x: Tensor, args: tuple, kwargs: dict) -> None:
        """Raise where the plain FFN gives other values for the same tokens in another arrangement."""
        tokens, name = x.reshape(-1, x.shape[-1]), type(self._plain).__name__
        if self._tried or len(tokens) < 2 or torch.compiler.is_compiling():
            return
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise TypeError(f'{name} takes tensors beside the tokens, which cannot be shared out to experts')
        run = functools.partial(run_with, self._plain, self.mean_tensors(), training=False)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):  # an FFN that draws must not draw twice
            y = run(x, *args, **kwargs)
            if not isinstance(y, Tensor):
                raise TypeError(f'{name} returns a {type(y).__name__}; experts need an FFN that returns one tensor')
            try:
                flipped = run(_rows(tokens.flip(0), x.ndim), *args, **kwargs).reshape(len(tokens), -1).flip(0)
                same = _close(flipped, y.reshape(len(tokens), -1)) or not _close(run(x, *args, **kwargs), y)
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                raise TypeError(f'{name} does not take the tokens of {tuple(x.shape)} in another arrangement '
                                f'{_EXPECTED}: {error}') from error
        if not same:
            raise TypeError(f'{name} does not treat every token of {tuple(x.shape)} alone {_EXPECTED}')
        self._tried = True

    def extra_repr(self) -> str:
        return f'{type(self._plain).__name__}, num_experts={self.num_experts}, partition={self.partition!r}'


def iter_experts(model: nn.Module) -> Iterator[tuple[str, StackedExperts]]:
    """``(name, module)`` of every module with stacked experts in ``model``, each once."""
    for name, module in model.named_modules():
        if isinstance(module, StackedExperts):
            yield name, module


_EXPECTED = "(channels first, or tokens mixed?); experts need an FFN from (..., C) to (..., C')"


def _close(y: Tensor, other: Tensor) -> bool:
    """Up to rounding; products in low precision depend on the number of rows."""
    tolerance = 1e-3 if autocast(y).dtype in (torch.float32, torch.float64) else 5e-2
    return y.shape == other.shape and torch.allclose(y.float(), other.float(), tolerance,
                                                     tolerance * float(other.abs().max()), equal_nan=True)


def _rows(tokens: Tensor, ndim: int) -> Tensor:
    """``(m, C)`` as ``(1, ..., m, C)`` with ``ndim`` dimensions."""
    return tokens.reshape(*[1] * (ndim - 2), *tokens.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors of a module
# ---------------------------------------------------------------------------------------------------------------------
def _tensors(module: nn.Module, remove_duplicate: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by name, those that do not go into a state dict included."""
    return {**dict(module.named_parameters(remove_duplicate=remove_duplicate)),
            **dict(module.named_buffers(remove_duplicate=remove_duplicate))}


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """``value`` as the kind of tensor that ``tensor`` is: a parameter with the same flag, or a buffer."""
    return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def expert_mean(stacked: Tensor) -> Tensor:
    """Mean over the experts, exact where they are equal; integers (counters, indices) are the first expert's."""
    if not (stacked.is_floating_point() or stacked.is_complex()):
        return stacked[0]
    wide = stacked.float() if stacked.dtype in (torch.float16, torch.bfloat16) else stacked
    return (wide[0] + (wide[1:] - wide[:1]).sum(0) / len(wide)).to(stacked.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts that need no call of the plain forward
# ---------------------------------------------------------------------------------------------------------------------
_MLP_LAYERS = ['fc1', 'act', 'drop1', 'norm', 'fc2', 'drop2']  # registered and called in this order
_MLP_FORWARDS = {('timm.layers.mlp', 'Mlp.forward'), ('ewa3d.layers.block', 'Mlp.forward')}
_POINTWISE = {nn.Identity, nn.Dropout, nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.SiLU,
              nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh}


def _known_layout(plain: nn.Module) -> bool:
    """``plain`` calls its children one after the other, and each of them is of a kind that can run for all experts.

    Classes are compared exactly: a subclass, a parametrized layer, a hook or a patched forward means unknown code.
    """
    forward = type(plain).forward
    in_order = forward is nn.Sequential.forward or (
        (forward.__module__, forward.__qualname__) in _MLP_FORWARDS and list(plain._modules) == _MLP_LAYERS)
    return (in_order and _untouched(plain) and not plain._parameters and not plain._buffers
            and all(_untouched(layer) and _runs_batched(layer) for layer in plain._modules.values()))


def _untouched(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or 'forward' in module.__dict__)


def _runs_batched(layer: nn.Module) -> bool:
    kind = type(layer)
    if kind is nn.LayerNorm:
        return len(layer.normalized_shape) == 1
    return kind is nn.Linear or kind in _POINTWISE or (
        kind.__module__ == 'timm.layers.activations' and not any(layer.parameters()))


# ---------------------------------------------------------------------------------------------------------------------
# Start of training, checks
# ---------------------------------------------------------------------------------------------------------------------
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
            origin = stacked[name][0]
            spread, drawn = origin.float().std(correction=0), value.float().std(correction=0)
            if spread > 0 and drawn > 0:
                stacked[name][i].copy_(value * (spread / drawn))


@torch.no_grad()
def _add_noise(module: StackedExperts, std: float) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) * std
            noise -= noise.mean(0)
            parameter += noise * (module.num_experts / (module.num_experts - 1)) ** 0.5


def _check_plain(plain: nn.Module) -> None:
    if not isinstance(plain, nn.Module):
        raise TypeError(f'expected an nn.Module to expand, got {type(plain).__name__}')
    name = type(plain).__name__
    if any(isinstance(layer, StackedExperts) for layer in plain.modules()):
        raise ValueError(f'{name} already has experts')
    if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in plain.parameters()):
        raise ValueError(f'{name} has lazy parameters: run it once before expanding it')
    if type(plain).forward is nn.Module.forward:
        raise ValueError(f'{name} has no forward, so it is no FFN; does the rule name one?')
    if next(plain.parameters(), None) is None:
        raise ValueError(f'{name} has no parameters, so it cannot have experts; does the rule name the FFN?')


def _check_choice(key: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f'{key}={value!r}: {nearest(value, valid)}')
