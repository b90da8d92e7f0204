"""Caches that several processes build, read and die in at once: always whole, or not there."""
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from ewa3d.datasets import FolderPointCloud, ShapeNetPart, cache

FORK = get_context('fork')  # what is patched here holds there


def make_folder(root: Path) -> Callable:
    for name in 'ab':
        (root / name).mkdir(parents=True)
        for i in range(6):
            np.save(root / name / f'{i}.npy', np.random.default_rng(i).normal(size=(40 + i, 3)))
    return lambda where: FolderPointCloud(root, cache_dir=where)


def make_parts(root: Path) -> Callable:
    (root / '02773838').mkdir(parents=True)
    (root / 'synsetoffset2category.txt').write_text('Bag\t02773838\n')
    names = [f'shape{i}' for i in range(6)]
    (root / 'shuffled_train_file_list.json').write_text(json.dumps([f'shape_data/02773838/{n}' for n in names]))
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        rows = np.column_stack([rng.normal(size=(30, 6)), rng.integers(4, 6, 30)])
        np.savetxt(root / '02773838' / f'{name}.txt', rows)
    return lambda where: ShapeNetPart(root, 'train', cache_dir=where)


def start(function: Callable, *args) -> int:
    """A process that does this; it ends with 0 where that went well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def samples(data) -> list:
    return [[sample['points'].tobytes(), str(sample.get('parts'))] for sample in map(data.raw, range(len(data)))]


@pytest.mark.parametrize('locks', [True, False])
@pytest.mark.parametrize('number', [2, 4])
@pytest.mark.parametrize('make', [make_folder, make_parts])
def test_processes_that_build_the_same_cache_at_once(tmp_path, monkeypatch, make, number, locks):
    """A reader meanwhile sees the whole of it or nothing. Without locks (of the file system) all of them write."""
    build, where, over = make(tmp_path / 'data'), tmp_path / 'cache', FORK.Event()
    expected, barrier, save = samples(build(None)), FORK.Barrier(number), np.save
    if not locks:
        monkeypatch.delitem(sys.modules, 'fcntl', raising=False)
        monkeypatch.setitem(sys.modules, 'fcntl', None)
        monkeypatch.setattr(cache.np, 'save', lambda *args: (barrier.wait(60), save(*args)))  # all are writing now

    def builds():
        barrier.wait(60)
        assert samples(build(where)) == expected

    def reads():
        seen, points = 0, [points for points, _ in expected]
        while not (over.is_set() and seen):
            for folder in where.glob('[!.]*/'):
                if folder.is_dir():  # and not a lock
                    clouds = cache.Clouds.load(folder)
                    assert [clouds[i][:, :3].tobytes() for i in range(len(clouds))] == points
                    seen += 1

    reader, builders = start(reads), [start(builds) for _ in range(number)]
    assert [ended(pid) for pid in builders] == [0] * number
    over.set()
    assert ended(reader) == 0
    assert len([f for f in where.iterdir() if f.is_dir()]) == 1


def test_who_waits_for_a_process_that_dies_builds_it(tmp_path, monkeypatch):
    """A lock dies with its process, whatever it was at; a lock that an earlier one left is none."""
    build, where = make_folder(tmp_path / 'data'), tmp_path / 'cache'
    expected, held, ordered = samples(build(None)), FORK.Event(), cache.ordered

    def stops(*args):
        yield next(iter(ordered(*args)))
        held.set()
        signal.pause()

    monkeypatch.setattr(cache, 'ordered', stops)
    first = start(build, where)
    assert held.wait(60)
    monkeypatch.setattr(cache, 'ordered', ordered)
    out, into = os.pipe()

    def waits():
        monkeypatch.setattr(cache, 'print_log', lambda text, *args: os.write(into, f'{text}\n'.encode()))
        assert samples(build(where)) == expected

    second = start(waits)
    assert b'another process writes this cache; waiting' in os.read(out, 4096)
    assert len(list(where.glob(f'{cache.WRITING}*'))) == 1 and not list(where.glob('data_*/'))
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL and ended(second) == 0
    assert not list(where.glob(f'{cache.WRITING}*'))
    lock, = where.glob('*.lock')
    lock.write_text('left by somebody')
    for path in where.glob('*/*'):
        path.unlink()
    assert samples(build(where)) == expected
