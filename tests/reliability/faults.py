"""Faults to order: a module ``os`` whose k-th operation fails, and all kinds of files to be written with it."""
import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ewa3d import files
from ewa3d.datasets.io import import_open3d
from ewa3d.engine import checkpoint
from ewa3d.figures import draw_confusion
from ewa3d.report import write_report
from ewa3d.visualization import write_ply

OPERATIONS = ('open', 'fsync', 'ftruncate', 'chmod', 'replace')


class FaultyOS:
    """Stands for the module ``os`` in a module that writes files.

    Args:
        at: called before every operation with its name and, where it is a write, a function that does a share of it.
    """

    def __init__(self, at: Callable[[str, Callable], None]):
        self._at = at

    def __getattr__(self, name: str):
        value = getattr(os, name)
        if name not in OPERATIONS:
            return value

        def operation(*args, **kwargs):
            self._at(name)
            return value(*args, **kwargs)

        return operation

    def write(self, handle: int, data) -> int:
        self._at('write', lambda share=0.5: os.write(handle, bytes(data)[:int(share * len(data))]))
        return os.write(handle, data)

    def fdopen(self, *args):
        return FaultyFile(os.fdopen(*args), self._at)


class FaultyFile:
    """An open file, of whose last write a part gets through."""

    def __init__(self, file, at):
        self._file, self._at = file, at

    def __getattr__(self, name: str):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.close()

    def write(self, data) -> int:
        def part(share=0.5):
            self._file.write(bytes(data)[:int(share * memoryview(data).nbytes)])
            self._file.flush()

        self._at('write', part)
        return self._file.write(data)


class Fault:
    """An error at operation ``number``, counted from 0 (``None``: nowhere)."""

    def __init__(self, number: int | None = None, code: int = errno.ENOSPC):
        self.number, self.code, self.count = number, code, 0

    def __call__(self, name: str, part: Callable = lambda: None) -> None:
        here, self.count = self.count == self.number, self.count + 1
        if here:
            part()
            raise OSError(self.code, os.strerror(self.code))


# ---- what is written: functions of a path and a number, which changes the content -----------------------------------
def write_weights(path: Path, number: int) -> Path:
    return checkpoint.write_checkpoint(path, dict(a=torch.arange(600.).view(20, 30) + number), dict(epoch=number))


def write_whole_state(path: Path, number: int) -> Path:
    state = dict(a=torch.arange(600.).view(20, 30) + number)
    return checkpoint.write_checkpoint(path, state, dict(epoch=number), optimizer=dict(state=state), rng=[])


def write_official(path: Path, number: int) -> Path:
    checkpoint.save_torch(path, dict(base_model=dict(a=torch.arange(600.) + number)))
    return path


def write_run_report(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.with_name('metrics.jsonl')
    if not lines.exists():
        lines.write_text('{"mode": "val", "epoch": 1, "iter": 3, "OA": 50.0}')
    return write_report(path.parent, config=f'number = {number}')


def write_picture(path: Path, number: int) -> Path:
    return draw_confusion(np.eye(2) * number, ['a', 'b'], path)


def write_points(path: Path, number: int) -> Path:
    return write_ply(path, np.full((500, 3), number, np.float32))


def write_numbers(path: Path, number: int) -> Path:
    return files.atomic_write(path, f'[{number}]' * 900)


WRITERS = {'epoch_1.pth': write_whole_state, 'fused.safetensors': write_weights, 'fused.pth': write_weights,
           'official.pth': write_official, 'report.html': write_run_report, 'confusion.png': write_picture,
           'cloud.ply': write_points, 'metrics.json': write_numbers}


def need_open3d() -> None:
    """Import it, or skip the test: here, because it takes more memory than a fork may, and more than a plain import."""
    pytest.importorskip('libusb_package')
    try:
        import_open3d()
    except ImportError as error:
        pytest.skip(f'open3d: {error}')
