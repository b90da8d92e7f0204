"""Which checkpoint a run goes on from when the last one is damaged."""
import functools
from pathlib import Path

from ewa3d.engine.checkpoint import NewerFormatError, find_last_checkpoint, read_checkpoint
from ewa3d.engine.saving import INTERRUPTED

__all__ = ['damage', 'find_intact_checkpoint']


def find_intact_checkpoint(work_dir: str | Path) -> Path | None:
    """As :func:`find_last_checkpoint`; where that file is damaged, the newest beside it that is whole.

    Raises:
        FileNotFoundError: as there.
        ValueError: it is damaged and there is no other to resume from; or it was written by a newer ewa3d.
    """
    last = find_last_checkpoint(work_dir)
    if last is None or not damage(last):
        return last
    files = (p for pattern in ('epoch_*.pth', 'iter_*.pth', INTERRUPTED) for p in Path(work_dir).glob(pattern))
    for other in sorted(files, key=lambda p: (p.stat().st_mtime, len(p.name), p.name), reverse=True):
        if other != last and not damage(other):
            return other
    raise ValueError(f'{damage(last)}; {work_dir} has no other checkpoint that a run could be resumed from')


def damage(path: str | Path) -> str:
    """Why no run can be resumed from a checkpoint; nothing where one can. A file is read once."""
    stat = Path(path).stat()
    return _damage(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _damage(path: str, size: int, changed: int) -> str:
    try:
        checkpoint = read_checkpoint(path)
    except NewerFormatError:
        raise
    except ValueError as error:
        return str(error)
    return '' if 'optimizer' in checkpoint else f'checkpoint {path} holds weights but no training state'
