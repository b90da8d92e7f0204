"""Activation checkpointing: what is between a block's input and its output is computed again in the backward pass."""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ewa3d.layers.modality import ModalityNorm
from ewa3d.registry import nearest
from ewa3d.reparam import glob

__all__ = ['checkpoint_modules', 'checkpointed']


def checkpoint_modules(model: nn.Module, names: str | Sequence[str]) -> None:
    """From now on these modules of ``model`` are :func:`checkpointed` in training, and so are those of its copies.

    Args:
        names: with ``*`` for any part, ``'backbone.blocks.*'``.

    Raises:
        ValueError: a name that no module has, or a module with norms of several modalities.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    for name in [names] if isinstance(names, str) else names:
        chosen = {key: module for key, module in modules.items() if glob(name).fullmatch(key)}
        if not chosen:
            raise ValueError(f'activation_checkpointing: {name!r} names no module of {type(model).__name__}; '
                             f'{nearest(name, modules)}')
        for key, module in chosen.items():
            if any(isinstance(part, ModalityNorm) for part in module.modules()):
                raise ValueError(f'activation_checkpointing: {key!r} has norms of several modalities; it would be '
                                 'computed again with those of the modality that came last')
            module.forward = MethodType(_forward, module)  # a deep copy has its own


def _forward(module: nn.Module, *args, **kwargs):
    run = partial(type(module).forward, module)
    return _again(module, run, args, kwargs) if module.training else run(*args, **kwargs)


def checkpointed(module: nn.Module, *args, **kwargs):
    """``module(*args, **kwargs)``, keeping the inputs alone for the backward pass.

    The same bit for bit, losses, gradients and what is left in the module: randomness (dropout, stochastic depth, EWA's
    partition) is replayed from the generators' states, and the second forward pass moves no batch statistics a second
    time. Without gradients it is a plain call.
    """
    return _again(module, module, args, kwargs)


def _again(module: nn.Module, run: Callable, args: tuple, kwargs: dict):
    """``run(*args, **kwargs)``, which moves what is in ``module`` once."""
    if not torch.is_grad_enabled():
        return run(*args, **kwargs)
    # a compiled graph is told what to compute again and moves buffers once; it takes no contexts of Python
    options = {} if torch.compiler.is_compiling() else dict(context_fn=lambda: (nullcontext(), _unmoved(module)))
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=True, **options, **kwargs)


@contextmanager
def _unmoved(module: nn.Module) -> Iterator[None]:
    """What runs inside leaves buffers (batch statistics) and attributes (a router's statistics) as they were."""
    buffers: list[Tensor] = list(module.buffers())
    before = [buffer.detach().clone() for buffer in buffers]
    attributes = [(part, dict(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, values in attributes:
            vars(part).update(values)
        with torch.no_grad():
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)
