"""Training steps of 1, 2 and 4 processes under DDP, at a fixed batch of each and at a fixed batch of all: gloo, one
process a rank, or nccl with a GPU a rank.

Times are those that pass: ``--clock cpu`` would miss the work of the other processes. ``--threads`` are a rank's; on a
machine with fewer cores than ranks times threads, ranks wait for each other's cores and the numbers are those of that.
"""
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import nullcontext
from multiprocessing.connection import wait
from pathlib import Path

import torch
import torch.distributed as dist

from ewa3d.bench.harness import Case, Settings, Work
from ewa3d.bench.step import FULL, QUICK, ewa_rules, training_step

__all__ = ['Crew', 'cases']

RANKS = {'cpu': (1, 2, 4), 'cuda': (1, 2, 4, 8)}
MODELS = {'plain': 0, 'EWA, every 2nd FFN': 2}
EACH, ALL = 8, 32  # samples of a rank, and of all ranks together


def cases(settings: Settings) -> Iterator[Case]:
    """The classifier of the suite ``step``, plain and with 4 experts in every second FFN. ``exchange`` is the share of
    a step that is saved where gradients stay on their rank, waiting for the slowest rank included."""
    size = QUICK if settings.quick else FULL
    most = torch.cuda.device_count() if settings.device.type == 'cuda' else 2 if settings.quick else 4
    counts = [count for count in RANKS[settings.device.type] if count <= most]
    with Crew(counts, settings) as crew:
        for dtype in settings.dtypes:
            for what, batches in ((f'{EACH} samples a rank', dict.fromkeys(counts, EACH)),
                                  (f'{ALL} samples', {count: ALL // count for count in counts})):
                crew.ask(max(counts), 'clear')
                yield Case(f'train step {size["depth"]} × {size["dim"]}, {what}, {dtype}', {
                    f'{count} rank{"s" * (count > 1)}, {name}': crew.builder(
                        count, ({**size, 'batch': batch}, dtype, every))
                    for count, batch in batches.items() for name, every in MODELS.items()})


class Crew:
    """Processes that step together, the first so many of them as are asked for.

    Args:
        counts: numbers of processes that will be asked for; a process group is made for each.

    Raises:
        RuntimeError: what went wrong in one of them, with its traceback.
    """

    def __init__(self, counts: list[int], settings: Settings):
        self.counts, self.settings = counts, settings
        self.pipes, self.processes = [], []

    def __enter__(self) -> 'Crew':
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
        if 'forkserver' in methods:
            context.set_forkserver_preload([__name__, 'ewa3d.models', 'torch.nn.parallel'])
        self.folder = tempfile.TemporaryDirectory(prefix='ewa3d-')
        for rank in range(max(self.counts)):
            ours, theirs = context.Pipe()
            process = context.Process(target=_member, args=(rank, self.counts, self.settings,
                                                            str(Path(self.folder.name, 'store')), theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        return self

    def __exit__(self, *exc) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()

    def builder(self, count: int, model: tuple):
        """A builder (see :class:`Case`) of one step of ``count`` processes."""
        def build() -> Work:
            batch = model[0]['batch']
            facts = {'ranks': count, 'batch of each': batch, **self.ask(count, 'build', model)}
            return Work(lambda: self.ask(count, 'step', model), facts, items=batch * count)
        return build

    def ask(self, count: int, action: str, model: tuple = ()):
        """``'build'`` a step, make one (``'step'``) or forget all of them (``'clear'``); what the first process answers
        once all are done."""
        for pipe in self.pipes[:count]:
            pipe.send((count, action, model))
        waiting, answers = list(self.pipes[:count]), {}
        while waiting:
            for pipe in wait(waiting):
                try:
                    fine, answers[pipe] = pipe.recv()
                except EOFError:
                    fine, answers[pipe] = False, 'the process is gone'
                if not fine:
                    raise RuntimeError(f'rank {self.pipes.index(pipe)} of {count}: {answers[pipe]}')
                waiting.remove(pipe)
        return answers[self.pipes[0]]


def _member(rank: int, counts: list[int], settings: Settings, store: str, pipe) -> None:
    """One process of a crew: does as it is told until it is killed."""
    try:
        torch.set_num_threads(settings.threads)
        if settings.device.type == 'cuda':
            settings = dataclasses.replace(settings, device=torch.device('cuda', rank))
            torch.cuda.set_device(rank)
        dist.init_process_group('nccl' if settings.device.type == 'cuda' else 'gloo', init_method=f'file://{store}',
                                rank=rank, world_size=max(counts))
        groups = {count: dist.new_group(list(range(count))) for count in counts}
        steps = {}
        while True:
            count, action, model = pipe.recv()
            key, answer = (count, str(model)), None
            if action == 'clear':
                steps.clear()
            elif action == 'build':
                steps[key] = _Step(settings, model, groups[count] if count > 1 else None)
                answer = steps[key].facts()
            else:
                steps[key]()
            pipe.send((True, answer))
    except EOFError:
        os._exit(0)
    except Exception:
        pipe.send((False, traceback.format_exc()))


class _Step:
    """A step of one process; ``model``: sizes, dtype, experts in every so many-th FFN."""

    def __init__(self, settings: Settings, model: tuple, group):
        size, dtype, every = model
        torch.manual_seed(settings.seed)
        self.settings, self.group, self.wrapped = settings, group, None
        self.step = training_step(settings, size, dtype, ewa_rules(every), wrap=self._wrap)

    def _wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        self.bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.group is not None:
            ids = [self.settings.device.index] if self.settings.device.type == 'cuda' else None
            model = self.wrapped = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=ids, process_group=self.group, broadcast_buffers=False)
        return model

    def __call__(self, exchange: bool = True) -> None:
        with nullcontext() if exchange or self.wrapped is None else self.wrapped.no_sync():
            self.step()
        if self.settings.device.type == 'cuda':
            torch.cuda.synchronize(self.settings.device)

    def facts(self) -> dict[str, float]:
        """The gradients' MiB, and the share of a step that exchanging them takes: pairs of steps with and without."""
        if self.group is None:
            return {'gradients, MiB': self.bytes / 2**20, 'exchange': 0.}
        shares = []
        for _ in range(1 + (1 if self.settings.quick else 5)):
            seconds = []
            for exchange in (True, False):
                dist.barrier(self.group)
                start = time.perf_counter()
                self(exchange)
                seconds.append(time.perf_counter() - start)
            shares.append(1 - seconds[1] / seconds[0])
        return {'gradients, MiB': self.bytes / 2**20, 'exchange': statistics.median(shares[1:])}
