"""Which checkpoint a run goes on from when the last one is damaged."""
import functools
from pathlib import Path

from ewa3d.engine.checkpoint import NewerFormatError, find_last_checkpoint, read_checkpoint
from ewa3d.engine.saving import INTERRUPTED

__all__ = ['damage', 'find_intact_checkpoint', 'passed_over', 'read_once']

_kept: dict[tuple, dict] = {}  # what was read last, for who needs it next


def find_intact_checkpoint(work_dir: str | Path) -> Path | None:
    """The checkpoint that ``last_checkpoint`` points to; where that file is damaged or gone, or a run was killed before
    it pointed there, the newest in ``work_dir`` that is whole. ``None`` where no run has saved one.

    Raises:
        FileNotFoundError: the pointer names a file that is not there, and there is no other.
        ValueError: the checkpoint is damaged and there is no other to resume from; or it was written by a newer ewa3d.
    """
    last, reason = _last(work_dir)
    if not reason:
        return last
    folders = {Path(work_dir), last.parent if last else Path(work_dir)}  # checkpoints may lie in another folder
    files = (p for folder in folders for pattern in ('epoch_*.pth', 'iter_*.pth', INTERRUPTED)
             for p in folder.glob(pattern))
    for other in sorted(files, key=lambda p: (p.stat().st_mtime, len(p.name), p.name), reverse=True):
        if other != last and not damage(other):
            return other
    if last is None:
        raise FileNotFoundError(f'{reason}, and {work_dir} has no checkpoint that a run could be resumed from')
    raise ValueError(f'{reason}; {work_dir} has no other checkpoint that a run could be resumed from')


def passed_over(work_dir: str | Path) -> str:
    """Why :func:`find_intact_checkpoint` gives another one than ``last_checkpoint`` names; nothing where it does not.
    """
    return _last(work_dir)[1]


def damage(path: str | Path) -> str:
    """Why no run can be resumed from a checkpoint; nothing where one can. A file is read once."""
    return _damage(_state_of(path))


def read_once(path: str | Path, keep: bool = False) -> dict:
    """What :func:`~ewa3d.engine.checkpoint.read_checkpoint` gives, without reading what :func:`damage` has just read.

    Args:
        keep: somebody else will ask for it. What is given out then is not to be changed.
    """
    key = _state_of(path)
    if keep and not damage(path) and key in _kept:
        return _kept[key]
    return _kept.pop(key, None) or read_checkpoint(path)


def _last(work_dir: str | Path) -> tuple[Path | None, str]:
    """What ``last_checkpoint`` names, and why that will not do."""
    try:
        last = find_last_checkpoint(work_dir)
    except FileNotFoundError as error:
        return None, str(error)
    if last is None and Path(work_dir, INTERRUPTED).is_file():  # which is written before the pointer is
        return None, f'{work_dir} has no last_checkpoint'
    return last, damage(last) if last else ''


def _state_of(path: str | Path) -> tuple[str, int, int]:
    stat = Path(path).stat()
    return str(path), stat.st_size, stat.st_mtime_ns


@functools.lru_cache(maxsize=64)
def _damage(key: tuple[str, int, int]) -> str:
    try:
        checkpoint = read_checkpoint(key[0])
    except NewerFormatError:
        raise
    except ValueError as error:
        return str(error)
    if 'optimizer' not in checkpoint:
        return f'checkpoint {key[0]} holds weights but no training state'
    _kept.clear()
    _kept[key] = checkpoint
    return ''
