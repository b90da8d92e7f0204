"""What a file may unpack to: a checkpoint takes memory and time in proportion to its size, whoever wrote it."""
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = ['check_archive', 'check_tree', 'no_larger_than']

ROOM = 1 << 28  # bytes that a file, or a tensor, may unpack to, however small the file is
RATIO = 100  # a larger content may be so many times as large as its file
NUMBERS = 1 << 22  # parameters that any model may have
NODES = 100_000  # entries that a tree may have beyond one for each byte of its file


def check_archive(path: Path) -> None:
    """Raise ``ValueError`` where a zip file unpacks to so much more than it holds that only a trap would. (torch packs
    nothing, but reads what somebody packed to share it.)"""
    if not zipfile.is_zipfile(path):
        return  # the format of old releases, or damaged: torch says which
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > max(ROOM, RATIO * path.stat().st_size):
        raise ValueError(f'{path.stat().st_size} bytes that unpack to {unpacked}')


def check_tree(value, size: int) -> None:
    """Raise ``ValueError`` where a file of ``size`` bytes unfolds to much more: lists that hold one another many times
    over (or themselves), tensors that repeat their storage."""
    left, stack = size + NODES, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            if item.layout == torch.strided and item.numel() * item.element_size() > max(
                    ROOM, item.untyped_storage().nbytes()):
                raise ValueError(f'a tensor {tuple(item.shape)} on {item.untyped_storage().nbytes()} bytes')
            continue
        parts = item.values() if isinstance(item, Mapping) else item if isinstance(item, (list, tuple)) else ()
        left -= len(parts)
        if left < 0:
            raise ValueError('lists that hold one another without end')
        stack.extend(parts)


@contextmanager
def no_larger_than(weights: Mapping) -> Iterator[None]:
    """Raise ``ValueError`` where a model is built that has many times as many parameters as there are weights for it,
    before they take memory; while it is built, some modules may be there twice."""
    room = NUMBERS + 4 * sum(value.numel() for value in weights.values() if isinstance(value, Tensor))

    def count(module, name: str, value) -> None:
        nonlocal room
        room -= value.numel() if isinstance(value, Tensor) else 0
        if room < 0:
            raise ValueError('its config is that of a model much larger than its weights')

    handles = [register(count) for register in (register_module_parameter_registration_hook,
                                                register_module_buffer_registration_hook)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
