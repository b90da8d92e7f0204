"""Writing files so that a reader, or a crash, never meets half of one."""
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ['atomic_write', 'check_writable']


def atomic_write(path: str | Path, content: str | bytes | Callable[[IO[bytes]], object]) -> Path:
    """Write ``content`` to a temporary file beside ``path``, flush it to the disk, rename it to ``path``.

    Whatever happens, ``path`` is the old file or the complete new one; missing folders are made.

    Args:
        content: text, bytes, or a function that writes to the open binary file.

    Returns:
        ``path``.

    Raises:
        IsADirectoryError: ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; the name of a file was expected')
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    try:
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
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
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
