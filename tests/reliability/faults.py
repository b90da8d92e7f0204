"""Faults to order: a module ``os`` whose k-th operation fails or kills, and runs in processes that may die."""
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from ewa3d import files
from ewa3d.datasets.io import import_open3d
from ewa3d.engine.runner import Runner

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
    """What happens at operation ``number`` (counted from 0; ``None``: nowhere): an error, or the end of the process."""

    def __init__(self, number: int | None = None, code: int | None = None):
        self.number, self.code, self.count = number, code, 0

    def __call__(self, name: str, part: Callable = lambda: None) -> None:
        here, self.count = self.count == self.number, self.count + 1
        if not here:
            return
        part()
        if self.code is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.code, os.strerror(self.code))


def in_a_process(function: Callable[[Fault], None], kill_at: int | None, log: Path) -> tuple[bool, int]:
    """Run ``function`` in a fork that dies at operation ``kill_at``; whether it lived, and its number of operations."""
    counted = log.with_suffix('.count')
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            fault = Fault(kill_at)
            files.os = FaultyOS(fault)
            function(fault)
            counted.write_text(str(fault.count))
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False, 0
    assert os.WEXITSTATUS(status) == 0, log.read_text()[-3000:]
    return True, int(counted.read_text())


def train(cfg: dict, fault: Fault) -> None:
    """Train; every stage of the run is an operation, too."""
    runner = Runner.from_cfg(cfg)
    call = runner.call_hook

    def counting(stage: str, **kwargs) -> None:
        fault(stage)
        call(stage, **kwargs)

    runner.call_hook = counting
    runner.train()


def need_open3d() -> None:
    """Import it, or skip the test: here, because it takes more memory than a fork may, and more than a plain import."""
    pytest.importorskip('libusb_package')
    try:
        import_open3d()
    except ImportError as error:
        pytest.skip(f'open3d: {error}')
