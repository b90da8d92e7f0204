"""Data workers: one that dies, raises or hangs is named with the sample that it was at, and none outlives its run."""
import faulthandler
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch.multiprocessing import _prctl_pr_set_pdeathsig
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data._utils import MP_STATUS_CHECK_INTERVAL, signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

__all__ = ['Loader', 'WorkerError', 'end_workers', 'explain', 'watched']

TIMEOUT = 1200  # seconds that a batch may take, unless the loader says otherwise; other ranks wait longer than that
JOIN = 5  # seconds for a killed process to be gone; one that waits for a disk may take longer
NUMBERS = 3  # integers that say which sample it is: an index, or what a sampler of this package draws
HINTS = dict(SIGKILL='the system ends processes so where memory runs out', SIGBUS='is /dev/shm full?',
             SIGSEGV='where it was in the code stands above')
TELL = getattr(signal, 'SIGUSR1', None)  # makes a worker write where it is


class WorkerError(RuntimeError):
    """A data worker died or hangs."""


class Loader(DataLoader):
    """torch's, which can tell what its workers are at. See :func:`watched`.

    Attributes:
        workers: the processes that were started last.
    """
    workers: tuple = ()

    def _get_iterator(self) -> _MultiProcessingDataLoaderIter:
        self.check_worker_number_rationality()
        iterator = _Iterator(self)
        self.workers, self._latest = tuple(iterator._workers), weakref.ref(iterator)
        return iterator

    def position(self, worker: int) -> str:
        """At which sample a worker is, or was when it ended; nothing between two samples."""
        count, *numbers = self._at[worker].tolist()
        if not count:
            return ''
        index = numbers[0] if count == 1 else tuple(numbers[:count])
        return f'sample {index}{_name(self.dataset, index)}'


class _Iterator(_MultiProcessingDataLoaderIter):
    """torch's, which notices within seconds that a worker is gone, however long it may wait for a batch."""

    def _try_get_data(self, timeout: float = MP_STATUS_CHECK_INTERVAL):
        end = time.monotonic() + timeout
        while True:
            left = max(end - time.monotonic(), 0)
            found = super()._try_get_data(min(left, MP_STATUS_CHECK_INTERVAL))
            if found[0] or left <= MP_STATUS_CHECK_INTERVAL:
                return found
            if self._pin_memory and not self._pin_memory_thread.is_alive():
                raise RuntimeError('the thread that pins batches ended unexpectedly')


def watched(loader: DataLoader) -> DataLoader:
    """``loader``, of whose workers :func:`explain` can tell what they are at.

    Workers leave SIGINT and SIGTERM to the process that started them, end when that does, and write where they are to
    the standard error output on a crash and on SIGUSR1.
    """
    if loader.num_workers and type(loader) is DataLoader:
        loader.__class__ = Loader
        loader._at = torch.zeros(loader.num_workers, 1 + NUMBERS, dtype=torch.int64).share_memory_()
        loader.worker_init_fn = partial(_begin, loader.worker_init_fn, loader._at)
    return loader


# ---- in a worker ----------------------------------------------------------------------------------------------------
def _begin(then: Callable | None, at: torch.Tensor, worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == 'linux':
        _prctl_pr_set_pdeathsig(signal.SIGKILL)
    faulthandler.disable()  # where it was on before the fork, enable() would leave torch's handlers in place
    faulthandler.enable(file=2, all_threads=False)
    if TELL is not None:
        faulthandler.register(TELL, file=2, all_threads=False)
    dataset = get_worker_info().dataset
    if not hasattr(dataset, '__getitems__'):  # torch asks this one for a whole batch
        dataset.__getitems__ = partial(_fetch, dataset, at.numpy()[worker])
    if then is not None:
        then(worker)


def _fetch(dataset, at: np.ndarray, indices: list) -> list:
    """The samples of a batch; ``at`` says from outside which is being read."""
    samples = []
    for index in indices:
        with suppress(TypeError, ValueError):  # a sampler of one's own may draw names
            at[1:] = 0
            at[1:1 + np.size(index)] = index
            at[0] = np.size(index)
        try:
            samples.append(dataset[index])
        except Exception as error:
            error.add_note(f'sample {index}{_name(dataset, index)}')
            raise
        at[0] = 0
    return samples


def _name(dataset, index) -> str:
    """`` (chair_0001)`` where the data set can tell without reading."""
    with suppress(AttributeError, LookupError, TypeError):
        return f' ({dataset.name_of(index)})'
    return ''


# ---- in the process that started them -------------------------------------------------------------------------------
def explain(error: BaseException, loaders: Iterable) -> BaseException:
    """``error`` of torch about a worker that died or hangs as one that says which, of what, and at which sample; any
    other error as it is. What hangs writes where to the standard error output."""
    text = str(error)
    if not isinstance(error, RuntimeError) or isinstance(error, WorkerError) or 'DataLoader' not in text or \
            'Original Traceback' in text:
        return error
    found = []
    for loader in filter(_is_watched, loaders):
        hanging = 'timed out' in text and loader.timeout
        for number, process in enumerate(loader.workers):
            at, what = loader.position(number), ''
            if process.exitcode is not None and (process.exitcode or at):
                what = _ending(process.exitcode)
            elif hanging and at and process.is_alive():
                what = f'has not finished a batch for {loader.timeout:g} s (the timeout of its loader)'
                if TELL is not None:
                    os.kill(process.pid, TELL)
            if what:
                found.append(f'data worker {number} of {type(loader.dataset).__name__} (pid {process.pid}) {what}'
                             f'{", at " if at else ""}{at}')
        if hanging:
            time.sleep(0.2)  # for what the signal makes them write
    return WorkerError('; '.join(found)) if found else error


def _is_watched(loader) -> bool:
    return isinstance(loader, Loader)


def _ending(code: int) -> str:
    if code >= 0:
        return f'ended with exit code {code}'
    with suppress(ValueError):
        name = signal.Signals(-code).name
        return f'was ended by {name}' + (f' ({HINTS[name]})' if name in HINTS else '')
    return f'was ended by signal {-code}'


def end_workers(loaders: Iterable) -> None:
    """End the workers that are still there, whatever they do; a batch that is on its way is lost."""
    for loader in filter(_is_watched, loaders):
        iterator = loader._latest() if loader.workers else None
        if iterator is not None:  # or torch would take their end for an error
            signal_handling._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        for process in loader.workers:
            process.kill()
        for process in loader.workers:
            process.join(JOIN)
