"""Several processes train one model: the first that fails tells the others why, and none outlives it.

What they know of one another lies in the store of the process group. A rank that fails puts the reason there; the
others, whose collectives fail in consequence, find it. A thread in each rank looks for it, too, and ends a rank that
hangs where nothing can reach it.
"""
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size, is_distributed

from ewa3d.checks import check_number
from ewa3d.cli.errors import one_line

__all__ = ['EXIT_CODE', 'PeerError', 'hard_exit', 'leave_group', 'process_group_timeout', 'together', 'watch']

TIMEOUT = 1800  # seconds that a rank waits for another, unless env_cfg.dist_cfg.timeout says otherwise
GRACE = 20  # seconds after the first failure (or the timeout, if that is less), after which a rank is ended
POLL = 1
LATE = 3  # seconds in which ranks that notice the same failure have noticed it
EXIT_CODE = 4  # of a rank that ends because another one failed
OF_COLLECTIVES = re.compile('gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Ss]ocket|[Tt]imed out '
                            'waiting|DistStore|TCPStore|watchdog')

_run = 0  # which run of this group it is: what went wrong in an earlier one does not matter
_watch: '_Watch | None' = None


class PeerError(RuntimeError):
    """Another rank failed, is gone or hangs; whatever this one met follows from that.

    Attributes:
        first_traceback: that of the rank that failed first, where it has one.
    """

    def __init__(self, text: str, first_traceback: str = ''):
        super().__init__(text)
        self.first_traceback = first_traceback


def process_group_timeout(env_cfg: dict) -> float:
    """Seconds that a rank waits for the others in a collective: ``env_cfg.dist_cfg.timeout``."""
    return check_number('env_cfg.dist_cfg.timeout', (env_cfg.get('dist_cfg') or {}).get('timeout', TIMEOUT), '(0, inf)')


@contextmanager
def together(timeout: float = TIMEOUT, new_run: bool = False) -> Iterator[None]:
    """What is done in here by several ranks ends for all of them when one of them fails.

    Args:
        timeout: of the process group. new_run: whether this begins a run, on all ranks alike.

    Raises:
        PeerError: another rank failed first; its reason is in the message.
    """
    global _run, _watch
    _run += new_run
    watch(timeout)
    try:
        yield
    except Exception as error:
        found = _explained(error, timeout) if is_distributed() else error
        if found is not error:
            raise found from error
        raise
    finally:
        if _watch is not None:
            _watch.stop.set()
            _watch = None


def watch(timeout: float) -> None:
    """Begin to look for the failure of another rank, where there are others and nobody looks yet."""
    global _watch
    if is_distributed() and _watch is None:
        _watch = _Watch(timeout)


def leave_group() -> None:
    """Leave the processes that ran together, where there were any. Not after an error: what they still wait for would
    be waited for."""
    if is_distributed():
        dist.destroy_process_group()


# ---- what is in the store -------------------------------------------------------------------------------------------
def _store():
    return dist.distributed_c10d._get_default_store()


def _key(name) -> str:
    return f'ewa3d/{_run}/{name}'


def _announce(**cause) -> None:
    """Put down why this rank ends, if it is the first."""
    _store().compare_set(_key('cause'), '', json.dumps(dict(rank=get_rank(), **cause)))


def _cause(store) -> dict | None:
    return json.loads(store.get(_key('cause'))) if store.check([_key('cause')]) else None


# ---- the rank that fails, and those that notice ---------------------------------------------------------------------
def _explained(error: Exception, timeout: float) -> Exception:
    """``error`` itself where it is the first, else what it follows from."""
    if isinstance(error, PeerError):
        return error
    text, kind = one_line(error), type(error).__name__
    text = text if kind in text else f'{kind}: {text}'
    try:
        consequence = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError)
                                                            and bool(OF_COLLECTIVES.search(str(error))))
        if not consequence:
            _announce(text=text, traceback=traceback.format_exc())
        cause = _cause(_store()) or _missing(text, timeout)
    except Exception as gone:  # the store lies in a process that has ended
        return PeerError(f'the process that held the run together is gone ({type(gone).__name__}); before that: {text}')
    if cause['rank'] == get_rank() and not consequence:
        _record(error)
        return error
    own = '' if consequence else f'; this one, too: {text}'
    if 'missing' in cause:
        return PeerError(cause['text'] + own)
    return PeerError(f'rank {cause["rank"]} failed first: {cause["text"]}{own}', cause['traceback'])


def _missing(text: str, timeout: float) -> dict:
    """The cause where a collective failed and no rank said why: those that have not noticed it hang, or are gone."""
    store, end = _store(), time.monotonic() + LATE
    store.set(_key(f'noticed/{get_rank()}'), '1')
    ranks = range(get_world_size())
    while time.monotonic() < end and not _cause(store):
        time.sleep(POLL / 5)
        if all(store.check([_key(f'noticed/{rank}')]) for rank in ranks):
            break
    missing = [rank for rank in ranks if not store.check([_key(f'noticed/{rank}')])]
    if not _cause(store):
        names = ', '.join(f'rank {rank} ({store.get(_key(f"who/{rank}")).decode()})' for rank in missing
                          if store.check([_key(f'who/{rank}')]))
        how = (f'did not answer within {timeout:g} s (env_cfg.dist_cfg.timeout): hangs, or is that much slower'
               if 'imed out' in text else 'is gone: it was killed, or ended without an error')
        _announce(text=f'{names} {how}' if names else f'the ranks lost one another: {text}', missing=missing)
    return _cause(store)


def _record(error: Exception) -> None:
    """Tell torchrun, which prints it in the end."""
    if 'TORCHELASTIC_ERROR_FILE' in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler
        get_error_handler().record_exception(error)


class _Watch:
    """The thread that ends this rank when another one failed and it does not notice."""

    def __init__(self, timeout: float):
        self.stop, self.timeout = threading.Event(), timeout
        store = _store()
        self.store = store.clone() if hasattr(store, 'clone') else store  # one that waits for nobody
        self.key, self.rank = _key('cause'), get_rank()
        store.set(_key(f'who/{self.rank}'), f'{socket.gethostname()}, pid {os.getpid()}')
        threading.Thread(target=self._look, daemon=True, name='ewa3d-ranks').start()

    def _look(self) -> None:
        reason, left = '', 0.
        while not self.stop.wait(POLL):
            if not reason:
                reason = self._reason()
                left = self.timeout if reason.startswith('the store') else min(GRACE, self.timeout)
            elif left <= 0:
                break
            else:
                left -= POLL
        if not self.stop.is_set():
            sys.stderr.write(f'rank {self.rank} is ended, because {reason}. It is here:\n')
            sys.stderr.flush()
            faulthandler.dump_traceback(file=2)
            hard_exit(EXIT_CODE)

    def _reason(self) -> str:
        try:
            if not self.store.check([self.key]):
                return ''
            cause = json.loads(self.store.get(self.key))
        except Exception:
            return 'the store of the ranks is gone'
        return cause['text'] if 'missing' in cause else f'rank {cause["rank"]} failed: {cause["text"]}'


def hard_exit(code: int) -> None:
    """End this process without waiting for other ranks or for threads."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
