"""Writing files so that a reader, or a crash, never meets half of one."""
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ['append_line', 'atomic_write', 'check_writable', 'remove_leftovers']


def atomic_write(path: str | Path, content: str | bytes | Callable[[IO[bytes]], object]) -> Path:
    """Write ``content`` to a temporary file beside ``path``, flush it to the disk, rename it to ``path``.

    Whatever happens, ``path`` is the old file or the complete new one; missing folders are made.

    Args:
        content: text, bytes, or a function that writes to the open binary file.

    Returns:
        ``path``.

    Raises:
        IsADirectoryError: ``path`` is a folder.
        OSError: no space, no permission: names ``path``, which is what it was.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; the name of a file was expected')
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
        with os.fdopen(handle, 'wb') as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; these are ordinary files
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise _named(error, path, 'could not be written and is what it was before') from error
        raise
    return path


def check_writable(folder: str | Path, what: str) -> Path:
    """``folder`` as a path, if files can be written there, or it can be made; nothing is made.

    Raises:
        NotADirectoryError: it, or something above it, is a file. PermissionError: it may not be written to.
    """
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f'{what} {folder}: {there} is a file; a folder was expected')
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f'{what} {folder}: {there} cannot be written to; choose another folder')
    return folder


def append_line(path: str | Path, line: str) -> None:
    """Add a line to a text file and flush it to the disk. Half a line at its end, of a process that was killed, is cut
    off first; where writing fails, the file is left as it was.

    Raises:
        OSError: no space, no permission: names ``path``.
    """
    path = Path(path)
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            end = _end_of_last_line(handle)
            os.ftruncate(handle, end)
            try:
                rest = memoryview(line.encode() + b'\n')
                os.lseek(handle, end, os.SEEK_SET)
                while rest:
                    rest = rest[os.write(handle, rest):]
                os.fsync(handle)
            except OSError:
                os.ftruncate(handle, end)
                raise
        finally:
            os.close(handle)
    except OSError as error:
        raise _named(error, path, 'no line could be added') from error


def _end_of_last_line(handle: int, step: int = 4096) -> int:
    """Where the last newline of an open file is, and one more."""
    at = os.lseek(handle, 0, os.SEEK_END)
    while at > 0:
        start = max(0, at - step)
        os.lseek(handle, start, os.SEEK_SET)
        found = os.read(handle, at - start).rfind(b'\n')
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def remove_leftovers(folder: str | Path) -> None:
    """Delete what :func:`atomic_write` leaves in ``folder`` when its process is killed. Nobody may write there."""
    for path in Path(folder).glob('.*.tmp'):
        if path.is_file():
            path.unlink(missing_ok=True)


def _named(error: OSError, path: Path, what: str) -> OSError:
    """An error of the system as one that names ``path``."""
    return OSError(error.errno, f'{os.strerror(error.errno)}: {what}', str(path))
