"""A training in a process of its own, watched from outside, and SIGKILL at an event of a stage or after a time."""
import mmap
import os
import pathlib
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from faults import FaultyFile, FaultyOS

from ewa3d import cli, files
from ewa3d.datasets import cache
from ewa3d.engine import checkpoint, hooks, saving
from ewa3d.engine.runner import Runner

STAGES = ('elsewhere', 'cache', 'step', 'validation', 'checkpoint', 'metrics')
ENTERS = {'before_train_iter': 'step', 'before_val': 'validation'}
LEAVES = ('after_train_iter', 'after_val')


class Watch:
    """The stage that a process is in and the events that it met there, in memory that outlives it.

    Args:
        stage, number: SIGKILL at this event of this stage, counted from 0; nowhere without a stage.
        share: so much of what is being written then gets through.
    """

    def __init__(self, stage: str | None = None, number: int = 0, share: float = 0.5):
        self.stage, self.number, self.share = stage, number, share
        self._memory = np.frombuffer(mmap.mmap(-1, 8 * (1 + len(STAGES))), np.int64)

    @property
    def now(self) -> str:
        return STAGES[self._memory[0]]

    @property
    def counts(self) -> dict[str, int]:
        return dict(zip(STAGES, self._memory[1:].tolist()))

    def __call__(self, name: str = '', part: Callable[[float], object] | None = None) -> None:
        """An event; ``part(share)`` does a share of it."""
        at = 1 + self._memory[0]
        self._memory[at] += 1
        if self.now == self.stage and self._memory[at] > self.number:
            if part is not None:
                part(self.share)
            os.kill(os.getpid(), signal.SIGKILL)

    def enter(self, stage: str) -> str:
        before, self._memory[0] = self.now, STAGES.index(stage)
        return before

    @contextmanager
    def inside(self, stage: str) -> Iterator[None]:
        before = self.enter(stage)
        yield
        self.enter(before)

    def within(self, stage: str, function: Callable) -> Callable:
        def watched(*args, **kwargs):
            with self.inside(stage):
                return function(*args, **kwargs)
        return watched


def instrument(watch: Watch) -> None:
    """Put events everywhere; for a process that ends soon."""
    files.os = FaultyOS(watch)
    checkpoint.atomic_write = watch.within('checkpoint', checkpoint.atomic_write)
    saving.atomic_write = watch.within('checkpoint', saving.atomic_write)  # the pointer to it
    hooks.append_line = watch.within('metrics', hooks.append_line)
    cache.write = watch.within('cache', cache.write)
    ordered, save, opened, call = cache.ordered, np.save, pathlib.Path.open, Runner.call_hook

    def each(*args):
        for cloud in ordered(*args):
            watch('cloud')
            yield cloud

    def half_an_array(file, *args, **kwargs):
        watch('save', lambda share: Path(file).write_bytes(b'\x93NUMPY' * int(20 * share)))
        return save(file, *args, **kwargs)

    def watched_open(path, mode='r', *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        return FaultyFile(file, watch) if mode == 'wb' and path.parent.name.startswith(cache.WRITING) else file

    def call_hook(runner, stage, **kwargs):
        if stage == 'before_train':
            watch_model(runner, watch)
        if stage in ENTERS:
            watch.enter(ENTERS[stage])
        watch(stage)
        call(runner, stage, **kwargs)
        if stage in LEAVES:
            watch.enter('elsewhere')

    cache.ordered, np.save, pathlib.Path.open, Runner.call_hook = each, half_an_array, watched_open, call_hook


def watch_model(runner, watch: Watch) -> None:
    """An event after every module's forward, at every gradient, before and after the optimizer's step."""
    for module in runner.model.modules():
        module.register_forward_hook(lambda *args: watch('forward'))
    for parameter in runner.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: watch('gradient'))
    runner.optim_wrapper.optimizer.register_step_pre_hook(lambda *args: watch('step'))
    runner.optim_wrapper.optimizer.register_step_post_hook(lambda *args: watch('stepped'))


def attempt(argv: list[str], watch: Watch, log: Path, after: float | None = None) -> SimpleNamespace:
    """Run a command in a fork: ``.alive`` to its end, ``.where`` it was when it died, ``.seconds``, ``.counts``.

    Args:
        watch: kills at an event of its stage.
        after: the parent kills after so many seconds.
    """
    ended, into = os.pipe()
    start, pid = time.perf_counter(), os.fork()
    if pid == 0:
        code = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, 'w'), os.fdopen(2, 'w')
            instrument(watch)
            code = cli.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(into)
    if after is not None and not select.select([ended], [], [], after)[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    os.close(ended)
    alive = os.WIFEXITED(status)
    assert not alive or os.WEXITSTATUS(status) == 0, log.read_text()[-3000:]
    assert alive or os.WTERMSIG(status) == signal.SIGKILL
    return SimpleNamespace(alive=alive, where=None if alive else watch.now, seconds=time.perf_counter() - start,
                           counts=watch.counts)


def draw(rng: random.Random, kind: str, whole: SimpleNamespace) -> tuple[Watch, float | None]:
    """A moment of this kind, evenly over the first half of the events of that stage in the whole run, or a time."""
    if kind == 'time':
        return Watch(), rng.uniform(0, whole.seconds)
    number = rng.randrange(max(1, whole.counts[kind] // (1 if kind == 'cache' else 2)))
    return Watch(kind, number, rng.random()), None
