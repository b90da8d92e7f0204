"""Activation checkpointing: what is between a block's input and its output is computed again in the backward pass."""
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ['checkpointed']


def checkpointed(module: nn.Module, *args, **kwargs):
    """``module(*args, **kwargs)``, keeping the inputs alone for the backward pass.

    The same bit for bit, losses, gradients and what is left in the module: randomness (dropout, stochastic depth, EWA's
    partition) is replayed from the generators' states, and the second forward pass moves no batch statistics a second
    time. Without gradients it is a plain call.
    """
    if not torch.is_grad_enabled():
        return module(*args, **kwargs)
    # a compiled graph is told what to compute again and moves buffers once; it takes no contexts of Python
    options = {} if torch.compiler.is_compiling() else dict(context_fn=lambda: (nullcontext(), _unmoved(module)))
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=True, **options, **kwargs)


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
