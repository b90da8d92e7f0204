"""What a file may unpack to: a checkpoint takes memory and time in proportion to its size, whoever wrote it."""
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ['check_archive', 'check_tree']

ROOM = 1 << 28  # bytes that a file, or a tensor, may unpack to, however small the file is
RATIO = 100  # a larger content may be so many times as large as its file
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
