"""Prepared clouds on disk: ordered by farthest point sampling once, then mapped into memory by every worker.

A cache is a folder ``<name>-<settings>-<sources>`` with ``points.f32`` (rows of float32), ``offsets.npy`` (where each
cloud begins) and ``meta.json``. The two parts of its name are hashes of the settings and of the sources' names, sizes
and modification times, in their order: where one of them changes, another cache is written. It is written under a
temporary name and renamed, so that a cache that exists is whole.
"""
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import print_log

from ewa3d.ops import fps
from ewa3d.progress import Progress

__all__ = ['Clouds', 'NotPrepared', 'ReadNoFurther', 'cached_clouds', 'fps_order', 'only_prepared', 'prepared_rows',
           'without_cache']

VERSION = 2
BATCH = 32  # clouds that are read before they are ordered
FPS_POINTS = 40_960  # points that are ordered together: what stays in the processor's cache, measured
THIN = 65_536  # a larger cloud is thinned to so many points at random before it is ordered
WRITING = '.writing-'
ELSEWHERE = 'choose another one with cache_dir, or cache_dir=None to keep the clouds in memory'
_once: ContextVar[bool] = ContextVar('once', default=False)
_only_prepared: ContextVar[bool] = ContextVar('only_prepared', default=False)


class NotPrepared(OSError):
    """There is no cache, and none is to be written."""


@contextmanager
def only_prepared() -> Iterator[None]:
    """In here, clouds of which there is no cache are an error, :class:`NotPrepared`, instead of work."""
    token = _only_prepared.set(True)
    try:
        yield
    finally:
        _only_prepared.reset(token)


class Clouds:
    """Clouds of any sizes in one array; ``clouds[i]`` is a view ``(N_i, C)``. Pickles as a path where it has one."""

    def __init__(self, points: np.ndarray | None, offsets: np.ndarray, folder: Path | None = None):
        self._points, self.offsets, self.folder = points, offsets, folder

    @classmethod
    def load(cls, folder: Path) -> 'Clouds':
        """Raises:
            ValueError: something in the folder is missing or has another size than its meta file says.
        """
        try:
            columns = int(json.loads((folder / 'meta.json').read_text())['columns'])
            offsets = np.load(folder / 'offsets.npy', allow_pickle=False)
            rows = int(offsets[-1])
            points = np.memmap(folder / 'points.f32', np.float32, 'r', shape=(rows, columns))
            if points.size * 4 != (folder / 'points.f32').stat().st_size:
                raise ValueError('points.f32 has another size')
        except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f'{folder}: a damaged cache: {error}') from error
        return cls(np.asarray(points), offsets, folder)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> np.ndarray:
        if self._points is None:
            self._points = Clouds.load(self.folder)._points
        return self._points[self.offsets[i]:self.offsets[i + 1]]

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_points': None} if self.folder is not None else self.__dict__


class ReadNoFurther(ValueError):
    """What follows a cloud that could not be read was not read either."""


class CloudsOnce:
    """Clouds as they are read: each can be asked for once, in their order; none is kept."""

    def __init__(self, clouds: Iterable[np.ndarray], name: str):
        self._clouds, self._name, self._next = iter(clouds), name, 0

    def __getitem__(self, i: int) -> np.ndarray:
        if i < self._next:
            raise IndexError(f'{self._name}: cloud {i} was handed out already')
        while True:
            self._next += 1
            try:
                cloud = next(self._clouds)
            except StopIteration:
                raise ReadNoFurther(f'{self._name}: nothing could be read from cloud {self._next - 1} on') from None
            if self._next == i + 1:
                return cloud


@contextmanager
def without_cache() -> Iterator[None]:
    """Data sets that are made inside have :class:`CloudsOnce`: to look through the files without ordering them."""
    token = _once.set(True)
    try:
        yield
    finally:
        _once.reset(token)


def cached_clouds(cache_dir: Path | None, name: str, settings: dict, files: Iterable[Path], root: Path,
                  read: Callable[[], Iterable[np.ndarray]], total: int, max_points: int,
                  fps_ordered: bool = False) -> Clouds:
    """The clouds that ``read()`` yields, each cut to its first ``max_points`` in FPS order, from the cache or into it.

    Args:
        name: what the folder is called in front of the hashes.
        settings: everything else that the clouds, or the choice of the files, depend on: a cache of the same name and
            settings on other sources counts as outdated and is deleted.
        files: the sources, below ``root``, in the order of the clouds.
        fps_ordered: the clouds come in FPS order.

    Raises:
        NotPrepared: inside :func:`only_prepared`, there is no cache.
    """
    if _once.get():
        return CloudsOnce(read(), name)
    prepared = prepare(read, total, max_points, fps_ordered, name)
    if cache_dir is None and _only_prepared.get():
        raise NotPrepared(f'{name} has no cache')
    if cache_dir is None:
        clouds = list(prepared)
        return Clouds(np.concatenate(clouds), np.cumsum([0, *map(len, clouds)]))
    settings = {**settings, 'max_points': max_points, 'root': str(root.resolve()), 'version': VERSION}
    stem = f'{name}-{digest(settings)}'
    folder = cache_dir / f'{stem}-{digest(fingerprint(files, root))}'
    found = load_if_whole(folder)
    if found is not None:
        return found
    if _only_prepared.get():
        raise NotPrepared(f'there is no cache {folder}')
    make_writable(cache_dir)
    with lock(cache_dir / f'{stem}.lock') as alone:
        found = load_if_whole(folder)  # somebody else may have written it meanwhile
        if found is None:
            if alone:
                remove(cache_dir, f'{WRITING}{stem}-')  # of processes that were killed
            write(prepared, folder, settings)
            remove(cache_dir, f'{stem}-', keep=folder)  # the same settings on sources that are no more
    return found or Clouds.load(folder)


def remove(cache_dir: Path, prefix: str, keep: Path | None = None) -> None:
    """Delete the folders whose names begin so."""
    for folder in cache_dir.iterdir():
        if folder.name.startswith(prefix) and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def make_writable(cache_dir: Path) -> None:
    """Make the folder; ``OSError`` that says what to do where that fails."""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache_dir).close()
    except OSError as error:
        raise OSError(f'the cache folder {str(cache_dir)!r} cannot be written ({error}): {ELSEWHERE}') from error


def load_if_whole(folder: Path) -> Clouds | None:
    if not folder.is_dir():
        return None
    try:
        return Clouds.load(folder)
    except ValueError as error:
        print_log(f'{error}; it is written again', 'current')
        return None


def write(clouds: Iterator[np.ndarray], folder: Path, settings: dict) -> None:
    """Write a cache under a temporary name, then rename it."""
    start = time.perf_counter()
    temporary = Path(tempfile.mkdtemp(prefix=f'{WRITING}{folder.name}-', dir=folder.parent))
    try:
        offsets, columns = [0], 3
        with (temporary / 'points.f32').open('wb') as file:
            for cloud in clouds:
                file.write(np.ascontiguousarray(cloud, dtype='<f4').data)
                offsets.append(offsets[-1] + len(cloud))
                columns = cloud.shape[1]
            file.flush()
            os.fsync(file.fileno())
        np.save(temporary / 'offsets.npy', np.array(offsets, dtype=np.int64))
        (temporary / 'meta.json').write_text(json.dumps({'columns': columns, **settings}, indent=1))
        temporary.chmod(0o755)
        put(temporary, folder)
    except OSError as error:
        if error.filename is not None and not str(error.filename).startswith(str(temporary)):
            raise  # of a source
        reason = error.strerror or error
        raise OSError(f'the cache {str(folder)!r} could not be written ({reason}): {ELSEWHERE}') from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = offsets[-1] * columns * 4 / 1e6
    print_log(f'wrote the cache {folder}: {len(offsets) - 1} clouds, {size:.0f} MB, '
              f'{time.perf_counter() - start:.0f} s', 'current')


def put(temporary: Path, folder: Path) -> None:
    """Give a cache its name; one that is whole and was there first stays, for the sake of those who read it."""
    if folder.exists() and load_if_whole(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        temporary.rename(folder)
    except OSError:  # without locks, another process may have been quicker
        if load_if_whole(folder) is None:
            raise


@contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Let one process at a time in, where the system has file locks; elsewhere two may do the same work, safely. Gives
    whether there was a lock to be had."""
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open('w') as file:
        alone = False
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print_log(f'another process writes this cache; waiting for it to let go of {path}', 'current')
                fcntl.flock(file, fcntl.LOCK_EX)  # of a process that died there is no lock left
            alone = True
        yield alone


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(files: Iterable[Path], root: Path) -> list:
    """Name, size and modification time of every source, in their order: row i of a cache is the i-th cloud."""
    found = []
    for file in files:
        stat = file.stat()
        name = file.relative_to(root) if file.is_relative_to(root) else os.path.relpath(file, root)
        found.append((str(name), stat.st_size, stat.st_mtime_ns))
    return found


def prepare(read: Callable[[], Iterable[np.ndarray]], total: int, max_points: int, fps_ordered: bool,
            name: str) -> Iterator[np.ndarray]:
    """Read, order and cut the clouds, saying how far it is and how long it will take."""
    batch, done, columns = [], 0, None
    with Progress(f'preparing {name}', total) as progress:
        for cloud in read():
            if columns is not None and cloud.shape[1] != columns:
                raise ValueError(f'{name}: cloud {done + len(batch)} has {cloud.shape[1]} columns, the ones before it '
                                 f'have {columns}')
            columns = cloud.shape[1]
            batch.append(cloud)
            if len(batch) < BATCH and done + len(batch) != total:
                continue
            yield from (c[:max_points] for c in batch) if fps_ordered else ordered(batch, max_points, done)
            done, batch = done + len(batch), []
            progress.update(done)
    if done != total or batch:
        raise ValueError(f'{name}: {total} clouds are listed, {done + len(batch)} were read')


def ordered(clouds: list[np.ndarray], max_points: int, first: int) -> Iterator[np.ndarray]:
    """The clouds in FPS order, cut; ``first`` is the index of the first of them (it seeds the thinning)."""
    for i, cloud in enumerate(clouds):
        if len(cloud) > max(THIN, max_points):
            clouds[i] = cloud[thinned(len(cloud), max_points, first + i)]
    for cloud, order in zip(clouds, fps_order(clouds, max_points)):
        yield cloud[order]


def thinned(size: int, max_points: int, seed: int) -> np.ndarray:
    """The rows that are left of a large cloud before it is ordered."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(size, max(THIN, max_points), replace=False))


def prepared_rows(cloud: np.ndarray, max_points: int) -> np.ndarray:
    """Row indices of the points that a cache would keep of a cloud, in its order.

    Shape:
        - cloud ``(N, 3+F)``; returns ``(M,)`` int64, at most ``max_points`` of them.
    """
    if len(cloud) <= max(THIN, max_points):
        return fps_order([cloud], max_points)[0]
    rows = thinned(len(cloud), max_points, 0)
    return rows[fps_order([cloud[rows]], max_points)[0]]


def fps_order(clouds: list[np.ndarray], num: int, start: int = 0) -> list[np.ndarray]:
    """Row indices of each cloud's first ``num`` points (all where there are fewer) by farthest point sampling from
    point ``start``. Points that coincide come last, in their own order; none is repeated."""
    by_size: dict[int, list[int]] = {}
    for i, cloud in enumerate(clouds):
        by_size.setdefault(len(cloud), []).append(i)
    orders: list = [None] * len(clouds)
    for i in by_size.pop(0, ()):
        orders[i] = np.empty(0, dtype=np.int64)
    for size, members in by_size.items():
        step = max(1, FPS_POINTS // size)
        for group in (members[i:i + step] for i in range(0, len(members), step)):
            xyz = torch.from_numpy(np.stack([np.array(clouds[i][:, :3], dtype=np.float32) for i in group]))
            for i, order in zip(group, fps(xyz, min(num, size), start=start).numpy()):
                orders[i] = without_repeats(order, size)
    return orders


def without_repeats(order: np.ndarray, size: int) -> np.ndarray:
    """FPS picks a point again when all that are left coincide with picked ones: put those left there instead."""
    first_seen = np.zeros(len(order), dtype=bool)
    first_seen[np.unique(order, return_index=True)[1]] = True
    if first_seen.all():
        return order
    kept = order[first_seen]
    left = np.setdiff1d(np.arange(size), kept)
    return np.concatenate([kept, left])[:len(order)]
