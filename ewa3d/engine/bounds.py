"""What a file may unpack to: a checkpoint takes memory and time in proportion to its size, whoever wrote it."""
import pickle
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = ['check_archive', 'check_pickles', 'check_tree', 'no_larger_than']

ROOM = 1 << 28  # bytes that a file, or a tensor, may unpack to, however small the file is
RATIO = 100  # a larger content may be so many times as large as its file
NUMBERS = 1 << 22  # parameters that any model may have
LEGACY = 5  # pickles that a checkpoint of an old release begins with
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


def check_pickles(path: Path) -> None:
    """Raise ``UnpicklingError`` where the pickles of a checkpoint would take time or memory without end, though all
    that they name is harmless: tuples that hold one another many times over, which are hashed as keys of a dict, and
    ``bytearray``, which takes any size."""
    room = path.stat().st_size + NODES
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.filename.endswith('.pkl'):
                    _check_pickle(archive.read(info), room)
        return
    with path.open('rb') as file, suppress(ValueError):  # what is no pickle is torch's to say
        for _ in range(LEGACY):
            _check_pickle(file, room)


def _check_pickle(content: bytes | IO[bytes], room: int) -> None:
    memo: dict[int, int] = {}  # what is kept for later: how many tuples a tuple unfolds to, 0 for anything else
    weight, fetched, last = 0, 0, ''
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name.endswith('PUT') or name == 'MEMOIZE':
            memo[len(memo) if argument is None else argument] = weight if last.startswith('TUPLE') else 0
        elif name.endswith('GET'):
            fetched += memo.get(argument, 0)
        elif name == 'DUP':
            fetched += weight
        elif name.startswith('TUPLE'):
            weight, fetched = 1 + fetched, 0
        if weight > room:
            raise pickle.UnpicklingError('tuples that hold one another')
        if name == 'GLOBAL' and argument.endswith(' bytearray'):
            raise pickle.UnpicklingError('GLOBAL bytearray')
        last = name


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
