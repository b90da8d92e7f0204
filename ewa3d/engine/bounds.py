"""What a file may unpack to: a checkpoint takes memory and time in proportion to its size, whoever wrote it."""
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ['check_archive', 'check_tree']

ROOM = 1 << 28  # bytes that a tensor may have, however small its file is
NODES = 100_000  # entries that a tree may have beyond one for each byte of its file


def check_archive(path: Path) -> None:
    """Raise ``ValueError`` where a zip file is packed (torch packs nothing) or its parts are larger than the whole."""
    if not zipfile.is_zipfile(path):
        return  # the format of old releases, or damaged: torch says which
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in members):
        raise ValueError('its parts are compressed, which PyTorch does not do')
    if sum(info.file_size for info in members) > path.stat().st_size:
        raise ValueError('its parts are larger than the file')


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
