"""Run a module with other tensors than its own, without touching it: safe for threads, shared layers and tied tensors.

``torch.func.functional_call`` puts the tensors into the module for the time of the call. Two threads in one module then
see each other's, and a layer that is registered twice does not get its own back. Here a stand-in of the module runs.
"""
from collections.abc import Mapping
from types import MethodType

import torch
from torch import Tensor, nn

__all__ = ['run_with']


@torch.compiler.disable
def run_with(module: nn.Module, tensors: Mapping[int, Tensor], *args, training: bool | None = None, **kwargs):
    """``module(*args, **kwargs)``, computed with ``tensors``.

    Hooks run as usual. What the forward does to the stand-in reaches the module as far as it is plain attributes; a
    buffer that it assigns anew is copied into the tensor that was given for it.

    Args:
        tensors: for the ``id`` of each parameter and buffer of ``module`` what to use in its place.
        training: the mode of the stand-in and everything in it; the module's own unless given.
    """
    memo: dict[int, nn.Module] = {}
    standin = _stand_in(module, tensors, training, memo)
    pairs = [(m, memo[id(m)]) for m in module.modules()]
    for _, copy in pairs:
        copy.__dict__.update({key: _relinked(value, memo) for key, value in copy.__dict__.items() if key not in _OWN})
    before = [dict(copy.__dict__) for _, copy in pairs]
    output = standin(*args, **kwargs)
    for (original, copy), old in zip(pairs, before):
        changed = {key: value for key, value in copy.__dict__.items() if key not in _OWN and value is not old.get(key)}
        original.__dict__.update(changed)
        _write_back(original, copy, tensors)
    return output


_OWN = ('_parameters', '_buffers', '_modules', 'training')  # of the stand-in itself


def _stand_in(module: nn.Module, tensors: Mapping[int, Tensor], training: bool | None, memo: dict) -> nn.Module:
    if id(module) not in memo:
        copy = memo[id(module)] = object.__new__(type(module))
        copy.__dict__.update(module.__dict__)
        for kind in ('_parameters', '_buffers'):
            own = getattr(module, kind)
            copy.__dict__[kind] = {name: None if t is None else tensors[id(t)] for name, t in own.items()}
        copy.__dict__['_modules'] = {name: None if child is None else _stand_in(child, tensors, training, memo)
                                     for name, child in module._modules.items()}
        if training is not None:
            copy.__dict__['training'] = training
    return memo[id(module)]


def _relinked(value, memo: dict):
    """An attribute that refers to a module, by itself, in a list or as a bound method, refers to its stand-in."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, MethodType) and id(value.__self__) in memo:
        return MethodType(value.__func__, memo[id(value.__self__)])
    if type(value) in (list, tuple):
        items = [_relinked(item, memo) for item in value]
        return value if all(a is b for a, b in zip(items, value)) else type(value)(items)
    if type(value) is dict:
        items = {key: _relinked(item, memo) for key, item in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    return value


def _write_back(original: nn.Module, copy: nn.Module, tensors: Mapping[int, Tensor]) -> None:
    for name, own in original._buffers.items():
        new = copy._buffers.get(name)
        if own is not None and new is not None and new is not tensors[id(own)]:
            tensors[id(own)].copy_(new.detach())
