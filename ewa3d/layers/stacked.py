"""Modules that hold E versions of a plain one: their tensors, how they load and run, and what fuses them.

A version is a plain FFN with other tensors. Layouts that are known run for all versions at once, as batched products;
any other FFN runs once a version, through a stand-in.
"""
import copy
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer
from ewa3d.layers.channels import ChannelIdle, TokenBatchNorm
from ewa3d.layers.partition import autocast, expert_layer_norm, expert_linear, scale_grad
from ewa3d.layers.standin import run_with
from ewa3d.registry import nearest
from ewa3d.reparam import Reparam

__all__ = ['Experts', 'StackedExperts', 'add_noise', 'check_choice', 'check_plain', 'expert_mean', 'is_mlp',
           'is_pointwise', 'iter_experts', 'rows_like', 'upgrade_keys']


class Experts(Reparam):
    """E versions of a plain module, with its parameter names.

    ``self._plain`` is a module of the plain class that is not registered: it shares the dictionaries of parameters,
    buffers and children with ``self``. So the state dict has the plain names, ``to()``, ``train()``, ``deepcopy`` and
    pickling need no care, and :func:`~ewa3d.layers.standin.run_with` runs its forward with any version's tensors.
    Children that the plain module does not have (a router) are put in by :meth:`add_own`.

    Args:
        body: the module to hold, already with its tensors; it is taken over.
        num_experts: E, at least 2.
    """
    opaque = True
    averaged = True  # the training expects an EWAHook
    can_average = True  # the mean of the experts' parameters is their mean's

    def __init__(self, body: nn.Module, num_experts: int):
        super().__init__()
        self.num_experts = check_integer('num_experts', num_experts, 2)
        self._own: tuple[str, ...] = ()
        self._tried = False
        for hooks in ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'):
            body.__dict__[hooks] = type(body.__dict__[hooks])()  # those of the module itself move with expand()
        self.training = body.training
        self.__dict__['_plain'] = body
        for shared in ('_parameters', '_buffers', '_modules', '_non_persistent_buffers_set'):
            self.__dict__[shared] = body.__dict__[shared]

    def add_own(self, name: str, module: nn.Module) -> None:
        """Register a child that is not the plain module's."""
        if any(name in getattr(self, kind) for kind in ('_parameters', '_buffers', '_modules')):
            raise ValueError(f'{type(self._plain).__name__} has a {name!r} of its own, a name that '
                             f'{type(self).__name__} needs')
        self.__dict__['_modules'] = dict(self._modules)
        self._own += (name,)
        self._modules[name] = module.train(self.training)

    def layers(self) -> dict[str, nn.Module]:
        """The plain module's children."""
        return {k: m for k, m in self._modules.items() if k not in self._own} if self._own else self._modules

    def body(self) -> nn.Module:
        """The plain module, with the tensors and children that this one has now."""
        if self._own:
            self._plain.__dict__['_modules'] = self.layers()
        return self._plain

    def train(self, mode: bool = True):
        self._plain.training = mode
        return super().train(mode)

    def expert_parameters(self) -> list[nn.Parameter]:
        """Every parameter whose leading dimension is the experts', tied ones once."""
        raise NotImplementedError(f'{type(self).__name__}.expert_parameters')

    def core_parameters(self) -> list[nn.Parameter]:
        """The parameters that all experts share and differ from by residuals."""
        return []

    def stacked(self, name: str, tensor: Tensor) -> Tensor | None:
        """``(E, ...)``: a tensor of the body in all versions; ``None`` where they share it."""
        raise NotImplementedError(f'{type(self).__name__}.stacked')

    def mean_tensors(self) -> dict[int, Tensor]:
        """The mean expert: ``id`` of a tensor of the body → its mean over the experts."""
        found = {}
        for name, tensor in _tensors(self.body()).items():
            stacked = self.stacked(name, tensor)
            found[id(tensor)] = tensor if stacked is None else expert_mean(stacked)
        return found

    def expert_tensors(self, grad_scale: float = 1.) -> list[dict[int, Tensor]]:
        """Each expert: ``id`` of a tensor of the body → the expert's view into the stacked one."""
        slices = {}
        for name, tensor in _tensors(self.body()).items():
            stacked = self.stacked(name, tensor)
            slices[id(tensor)] = [tensor] * self.num_experts if stacked is None else \
                (scale_grad(stacked, grad_scale) if stacked.requires_grad else stacked).unbind(0)
        return [{key: views[i] for key, views in slices.items()} for i in range(self.num_experts)]

    @torch.no_grad()
    def plain(self, tensors: dict[int, Tensor]) -> nn.Module:
        """A module of the plain class with these tensors (by ``id`` of the body's), with its flags, dtype and mode."""
        body = self.body()
        memo = {id(t): _like(t, tensors[id(t)].detach().clone()) for t in _tensors(body).values()}
        return copy.deepcopy(body, memo)

    # ---- running ----------------------------------------------------------------------------------------------------
    @property
    def fast(self) -> bool:
        """Whether all experts run at once; looked up each time, since hooks and layers may have been put in."""
        return _known_layout(self._plain, self.layers())

    def run_one(self, x: Tensor, value) -> Tensor:
        """A known layout with one set of tensors, ``value(name, tensor)``."""
        for name, layer in self.layers().items():
            if isinstance(layer, (nn.Linear, nn.LayerNorm)):
                weight, bias = (None if t is None else value(f'{name}.{key}', t)
                                for key, t in (('weight', layer.weight), ('bias', layer.bias)))
                x = F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else \
                    F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
            else:
                x = layer(x)
        return x

    def run_batched(self, y: Tensor, value=None, rejoin=None) -> Tensor:
        """A known layout, all experts at once.

        Args:
            value: ``value(name, tensor)``, the stacked tensor to use; :meth:`stacked` unless given.
            rejoin: for layers that need all tokens together, ``(layer, (E, M, H))`` to ``(E, M, H)``.

        Shape:
            - ``(E, M, C)`` to ``(E, M, C')``.
        """
        value = value or self.stacked
        for name, layer in self.layers().items():
            if isinstance(layer, (nn.Linear, nn.LayerNorm)):
                weight, bias = (None if t is None else value(f'{name}.{key}', t)
                                for key, t in (('weight', layer.weight), ('bias', layer.bias)))
                y = expert_linear(y, weight, bias) if isinstance(layer, nn.Linear) else \
                    expert_layer_norm(y, layer.normalized_shape, weight, bias, layer.eps)
            else:
                y = rejoin(layer, y) if isinstance(layer, TokenBatchNorm) else layer(y)
        return y

    def run_with(self, tensors: dict[int, Tensor], x: Tensor, *args, **kwargs) -> Tensor:
        """The plain forward with the tensors of one version."""
        return run_with(self.body(), tensors, x, *args, **kwargs)

    @torch.no_grad()
    def try_plain(self, x: Tensor, args: tuple, kwargs: dict) -> None:
        """Raise, the first time, where the plain FFN gives other values for the same tokens in another arrangement."""
        tokens, name = x.reshape(-1, x.shape[-1]), type(self._plain).__name__
        if self._tried or len(tokens) < 2 or torch.compiler.is_compiling():
            return
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise TypeError(f'{name} takes tensors beside the tokens, which cannot be shared out to experts')
        run = functools.partial(self.run_with, self.mean_tensors(), training=False)
        with torch.random.fork_rng([x.device] if x.is_cuda else []):  # an FFN that draws must not draw twice
            y = run(x, *args, **kwargs)
            if not isinstance(y, Tensor):
                raise TypeError(f'{name} returns a {type(y).__name__}; experts need an FFN that returns one tensor')
            try:
                flipped = run(rows_like(tokens.flip(0), x.ndim), *args, **kwargs).reshape(len(tokens), -1).flip(0)
                same = _close(flipped, y.reshape(len(tokens), -1)) or not _close(run(x, *args, **kwargs), y)
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                raise TypeError(f'{name} does not take the tokens of {tuple(x.shape)} in another arrangement '
                                f'{_EXPECTED}: {error}') from error
        if not same:
            raise TypeError(f'{name} does not treat every token of {tuple(x.shape)} alone {_EXPECTED}')
        self._tried = True


class StackedExperts(Experts):
    """E copies of a plain module, held as one module of its class whose tensors have a leading dimension E.

    Statistics of a :class:`~ewa3d.layers.channels.TokenBatchNorm` are of all tokens, so such a layer is shared. Hooks
    on modules below the plain one stay with the copies and then run once an expert.

    Args:
        plain: the module to multiply; it is copied.
        num_experts: E, at least 2.
        share_buffers: buffers stay as they are instead of being multiplied.
    """

    def __init__(self, plain: nn.Module, num_experts: int, share_buffers: bool = False):
        check_plain(plain)
        check_integer('num_experts', num_experts, 2)
        shared = {f'{name}.{key}'.lstrip('.') for name, layer in plain.named_modules()
                  if isinstance(layer, TokenBatchNorm) for key in _tensors(layer)}
        if share_buffers:
            shared |= {name for name, _ in plain.named_buffers()}
        memo = {}  # deepcopy takes these for the copies, so tied tensors stay tied
        for name, tensor in _tensors(plain).items():
            if name not in shared:
                memo[id(tensor)] = _like(tensor, tensor.detach()[None].repeat(num_experts, *[1] * tensor.ndim))
        super().__init__(copy.deepcopy(plain, memo), num_experts)
        self._shared = frozenset(shared)

    def stacked(self, name: str, tensor: Tensor) -> Tensor | None:
        return None if name in self._shared else tensor

    def expert_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.body().named_parameters() if name not in self._shared]

    def check_shared(self) -> None:
        """Raise where a batch norm of all tokens would run once an expert."""
        if self._shared and not self.fast:
            raise TypeError(f'{type(self._plain).__name__} has a batch norm of all tokens, and hooks or layers that '
                            'make every expert run by itself: leave out one of the two')

    def fuse(self) -> nn.Module:
        """A module of the plain class with the experts' mean: same keys, dtype, device, mode, ``requires_grad``."""
        return self.plain(self.mean_tensors())

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                              error_msgs):
        """A plain checkpoint loads into every expert; one with another number of experts is an error."""
        upgrade_keys(self._plain, state_dict, prefix, local_metadata)
        for name, own in _tensors(self.body(), remove_duplicate=False).items():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor) or value.shape == own.shape or name in self._shared:
                continue
            if value.shape == own.shape[1:]:
                state_dict[prefix + name] = value.detach()[None].repeat(self.num_experts, *[1] * value.ndim)
            elif value.ndim == own.ndim and value.shape[1:] == own.shape[1:]:
                error_msgs.append(f'{prefix + name} has {len(value)} experts in the checkpoint, the model has '
                                  f'{self.num_experts}: build it with num_experts={len(value)}, or load fused weights')
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
                                      error_msgs)


def upgrade_keys(plain: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    """Keys of older releases are renamed by the plain class; without tensors that is all that its loader does."""
    empty = object.__new__(type(plain))
    empty.__dict__.update(plain.__dict__, _parameters={}, _buffers={})
    empty._load_from_state_dict(state_dict, prefix, local_metadata, False, [], [], [])


def iter_experts(model: nn.Module) -> Iterator[tuple[str, Experts]]:
    """``(name, module)`` of every module with experts in ``model``, each once."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            yield name, module


_EXPECTED = "(channels first, or tokens mixed?); experts need an FFN from (..., C) to (..., C')"


def _close(y: Tensor, other: Tensor) -> bool:
    """Up to rounding; products in low precision depend on the number of rows."""
    tolerance = 1e-3 if autocast(y).dtype in (torch.float32, torch.float64) else 5e-2
    return y.shape == other.shape and torch.allclose(y.float(), other.float(), tolerance,
                                                     tolerance * float(other.abs().max()), equal_nan=True)


def rows_like(tokens: Tensor, ndim: int) -> Tensor:
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
    """Mean over the experts, exact where they are equal; integers (counters, indices) are the first expert's.

    Shape:
        - ``(E, ...)`` to ``(...)``.
    """
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


def _known_layout(plain: nn.Module, layers: dict[str, nn.Module]) -> bool:
    """``plain`` calls its children one after the other, and each of them is of a kind that can run for all experts.

    Classes are compared exactly: a subclass, a parametrized layer, a hook or a patched forward means unknown code.
    """
    forward = type(plain).forward
    in_order = forward is nn.Sequential.forward or (_is_mlp_forward(forward) and list(layers) == _MLP_LAYERS)
    return (in_order and _untouched(plain) and not plain._parameters and not plain._buffers
            and all(_untouched(layer) and _runs_batched(layer) for layer in layers.values()))


def _is_mlp_forward(forward) -> bool:
    return (forward.__module__, forward.__qualname__) in _MLP_FORWARDS


def is_mlp(plain: nn.Module) -> bool:
    """Whether ``plain`` is timm's ``Mlp`` or ours: these layers in this order."""
    return _is_mlp_forward(type(plain).forward) and list(plain._modules) == _MLP_LAYERS and 'forward' not in vars(plain)


def is_pointwise(layer: nn.Module) -> bool:
    """Whether ``layer`` is known to act on each number alone, without parameters."""
    kind = type(layer)
    return kind in _POINTWISE or (kind.__module__ == 'timm.layers.activations' and not any(layer.parameters()))


def _untouched(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks or 'forward' in module.__dict__)


def _runs_batched(layer: nn.Module) -> bool:
    kind = type(layer)
    if kind is nn.LayerNorm:
        return len(layer.normalized_shape) == 1
    if kind is ChannelIdle:
        return _untouched(layer.act) and _runs_batched(layer.act)
    return kind in (nn.Linear, TokenBatchNorm) or is_pointwise(layer)


# ---------------------------------------------------------------------------------------------------------------------
# Noise, checks
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def add_noise(module: Experts, std: float) -> None:
    """Noise on the trainable experts whose mean over them is zero."""
    for parameter in module.expert_parameters():
        if parameter.requires_grad:
            noise = torch.randn_like(parameter) * std
            noise -= noise.mean(0)
            parameter += noise * (module.num_experts / (module.num_experts - 1)) ** 0.5


def check_plain(plain: nn.Module) -> None:
    """Raise where ``plain`` cannot have experts."""
    if not isinstance(plain, nn.Module):
        raise TypeError(f'expected an nn.Module to expand, got {type(plain).__name__}')
    name = type(plain).__name__
    if any(isinstance(layer, Experts) for layer in plain.modules()):
        raise ValueError(f'{name} already has experts')
    if any(isinstance(p, nn.parameter.UninitializedTensorMixin) for p in plain.parameters()):
        raise ValueError(f'{name} has lazy parameters: run it once before expanding it')
    if type(plain).forward is nn.Module.forward:
        raise ValueError(f'{name} has no forward, so it is no FFN; does the rule name one?')
    if next(plain.parameters(), None) is None:
        raise ValueError(f'{name} has no parameters, so it cannot have experts; does the rule name the FFN?')


def check_choice(key: str, value: str, valid: tuple[str, ...]) -> None:
    """Raise where ``value`` is not one of ``valid``."""
    if value not in valid:
        raise ValueError(f'{key}={value!r}: {nearest(value, valid)}')
