"""Unpacking archives of strangers: what they hold is looked at first, and stays in the folder that was meant."""
import gzip
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from ewa3d.checks import some
from ewa3d.datasets.announced import RATIO, ROOM
from ewa3d.download import check_space
from ewa3d.progress import Progress

__all__ = ['look_into', 'remove_unfinished', 'unpack']

MEMBERS = 2_000_000  # files and folders that an archive may have
READ = 1 << 24  # bytes that a reader of headers may ask for at once; names longer than that are a trap
BROKEN = (zipfile.BadZipFile, zipfile.LargeZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError,
          NotImplementedError, RuntimeError, OverflowError, UnicodeError)


class Member(NamedTuple):
    """A file or folder in an archive; ``size`` is ``None`` for a folder."""
    name: str
    size: int | None
    open: Callable[[], IO[bytes]] | None = None


def unpack(archive: Path, target: Path, top: str, most: int | None = None) -> None:
    """Unpack the folder ``top`` of a zip, tar or tar.gz file as ``target``; what lies beside it is left out.

    Everything that the archive holds is looked at before the first file is written; files are written under a
    temporary name beside ``target``, which is whole or absent. They are ordinary files, whatever their modes were.

    Args:
        most: how many bytes the content may have, at most; by default a hundred times those of the archive.

    Raises:
        FileExistsError: ``target`` is there.
        ValueError: naming the archive: it is cut off, broken or of another kind, or packed too much; a member that
            would leave the folder, that is there twice, or that is neither a file nor a folder.
        OSError: no space, no permission.
    """
    if os.path.lexists(target):
        raise FileExistsError(f'{target} is there already; rename or delete it first')
    most, total = _bound(archive, most), look_into(archive, top, most)
    check_space(target.parent, total, f'unpack {archive.name}')
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f'.{target.name}.', suffix='.tmp'))
    try:
        with _named(archive), Progress(f'unpacking {archive.name}, MB', total // 10 ** 6) as bar:
            done = 0
            for member in _members(archive, most):
                done += _write(member, temporary, top)
                bar.update(done // 10 ** 6)
        os.replace(temporary / top, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def look_into(archive: Path, top: str, most: int | None = None) -> int:
    """How many bytes :func:`unpack` would write.

    Raises:
        ValueError: what it would refuse, as far as can be told without unpacking.
    """
    with _named(archive):
        return check_members(_members(archive, _bound(archive, most)), top, _bound(archive, most))


def _bound(archive: Path, most: int | None) -> int:
    return max(ROOM, RATIO * archive.stat().st_size) if most is None else most


def remove_unfinished(target: Path) -> None:
    """Delete what :func:`unpack` leaves when its process is killed. Nobody may be unpacking there."""
    for folder in target.parent.glob(f'.{target.name}.*.tmp'):
        shutil.rmtree(folder, ignore_errors=True)


def check_members(members: Iterator[Member], top: str, most: int) -> int:
    """How many bytes the files have, if all of them may be written.

    Raises:
        ValueError: see :func:`unpack`.
    """
    files: set[tuple] = set()
    folders: set[tuple] = set()
    others: dict[str, None] = {}
    total = 0
    for count, member in enumerate(members):
        parts = inside(member.name)
        if count >= MEMBERS:
            raise ValueError(f'more than {MEMBERS} members are refused')
        if parts[:1] != (top,):  # macOS adds a folder of its own
            others.update(dict.fromkeys(parts[:1]))
            continue
        above = {parts[:i] for i in range(1, len(parts))}
        if member.size is None:
            above.add(parts)
        elif parts in files or parts in folders:
            raise ValueError(f'{member.name!r} is in it twice')
        else:
            files.add(parts)
            total += member.size
        folders |= above
        if not files.isdisjoint(above):
            raise ValueError(f'{member.name!r} lies in a folder that is a file')
        if total > most:
            raise ValueError(f'what it holds is larger than {most} bytes: refused')
    if not files:
        raise ValueError(f'it should hold files in the folder {top!r}, and holds {some(others)}')
    return total


def inside(name: str) -> tuple[str, ...]:
    """The parts of a member's name; ``ValueError`` where it may lead out of the folder that it is unpacked to."""
    parts = tuple(part for part in name.split('/') if part not in ('', '.'))
    if name.startswith('/') or '..' in parts or re.match(r'[A-Za-z]:', name) or re.search(r'[\\\x00-\x1f]', name):
        raise ValueError(f'the name {name[:200]!r} leads out of the folder, or is none: refused')
    return parts


def _write(member: Member, folder: Path, top: str) -> int:
    """Write a file, or make a folder; how many bytes that were."""
    parts = inside(member.name)
    if parts[:1] != (top,):
        return 0
    path = folder.joinpath(*parts)
    if member.size is None:
        path.mkdir(parents=True, exist_ok=True)
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with member.open() as source, path.open('xb') as file:
        shutil.copyfileobj(source, file, 1 << 18)
        if file.tell() != member.size:
            raise EOFError(f'{member.name!r} has {file.tell()} bytes, {member.size} were announced')
    return member.size


@contextmanager
def _named(archive: Path) -> Iterator[None]:
    """Errors about the content of an archive as ones that name it."""
    try:
        yield
    except BROKEN as error:
        raise ValueError(f'{archive}: broken or cut off: {error}') from error
    except FileExistsError as error:  # names that are one and the same on this disk
        raise ValueError(f'{archive}: {Path(error.filename).name!r} is in it twice, in other letters') from error
    except ValueError as error:
        raise ValueError(f'{archive}: {error}') from error


# ---- formats --------------------------------------------------------------------------------------------------------
def _members(archive: Path, most: int) -> Iterator[Member]:
    """The members of an archive, one after the other; a file can be opened until the next one is asked for."""
    with archive.open('rb') as file:
        head = file.read(512)
    if head.startswith((b'PK\3\4', b'PK\5\6')):
        return _zip_members(archive)
    if head.startswith(b'\x1f\x8b') or head[257:262] == b'ustar':
        return _tar_members(archive, most, head.startswith(b'\x1f\x8b'))
    raise ValueError(f'is neither a zip nor a tar file; it begins with {head[:20]!r}')


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(f'{info.filename!r} is a link or a device: refused')
            if info.flag_bits & 1:
                raise ValueError(f'{info.filename!r} is encrypted')
            if info.is_dir():
                yield Member(info.filename, None)
            else:
                yield Member(info.filename, info.file_size, lambda info=info: file.open(info))


def _tar_members(archive: Path, most: int, packed: bool) -> Iterator[Member]:
    with (gzip.open if packed else open)(archive, 'rb') as content:
        stream = _Bounded(content, 2 * most + ROOM)
        with tarfile.open(fileobj=stream, mode='r:') as file:
            while (info := file.next()) is not None:
                if info.isdir():
                    yield Member(info.name, None)
                elif info.isreg() and not info.issparse() and info.size >= 0:
                    yield Member(info.name, info.size, lambda info=info: file.extractfile(info))
                else:
                    raise ValueError(f'{info.name!r} is a link, a device or a sparse file: refused')
                file.members.clear()  # a million of them would be kept
        if stream.last != bytes(tarfile.BLOCKSIZE):  # tarfile takes anything for the end
            raise EOFError('the archive ends where another file should begin')
        while stream.read(READ):  # to the checksum of gzip
            pass


class _Bounded:
    """A stream that gives so many bytes and no more, and not too many at once: headers are read into memory."""

    def __init__(self, file: IO[bytes], most: int):
        self._file, self._most, self.last = file, most, b''
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= READ:
            raise ValueError(f'a header of {size} bytes is refused')
        self.last = self._file.read(size)
        if self._file.tell() > self._most:
            raise ValueError(f'what it holds is larger than {self._most} bytes: refused')
        return self.last
