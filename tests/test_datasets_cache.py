"""The cache of prepared clouds: when it is rebuilt, and that it is whole or not there."""
import os
import threading

import numpy as np
import pytest

from ewa3d.datasets.cache import Clouds, cached_clouds, fps_order


@pytest.fixture
def source(tmp_path):
    """A folder of three clouds behind ``cached_clouds``; ``source.reads`` counts how often it was read."""
    class Source:
        order = 1
        root, cache = tmp_path / 'source', tmp_path / 'cache'
        reads = 0

        def open(self, settings=(), max_points=10, fps_ordered=False, cache='cache'):
            files = sorted(self.root.glob('*.npy'))[::self.order]

            def read():
                self.reads += 1
                return (np.load(file) for file in files)
            where = self.cache if cache == 'cache' else cache
            return cached_clouds(where, 'things', dict(settings), files, self.root, read, len(files), max_points,
                                 fps_ordered)
    source = Source()
    source.root.mkdir()
    for i, n in enumerate((5, 20, 12)):
        np.save(source.root / f'{i}.npy', np.random.default_rng(i).normal(size=(n, 4)).astype(np.float32))
    return source


def folders(source):
    return sorted(f.name for f in source.cache.iterdir() if f.is_dir())


def test_clouds_of_any_sizes_come_back_ordered_and_cut(source):
    clouds = source.open()
    assert len(clouds) == 3 and [len(clouds[i]) for i in range(3)] == [5, 10, 10]
    for i in range(3):
        original = np.load(source.root / f'{i}.npy')
        assert np.array_equal(clouds[i], original[fps_order([original], 10)[0]])
    assert not clouds[0].flags.writeable
    memory = source.open(cache=None)
    assert all(np.array_equal(memory[i], clouds[i]) for i in range(3))


@pytest.mark.parametrize('total', [2, 4, 40])
def test_other_clouds_than_are_listed_leave_no_cache(tmp_path, total):
    clouds = [np.eye(3, dtype=np.float32)] * 3
    for where in (tmp_path, None):
        with pytest.raises(ValueError, match=f'things: {total} clouds are listed, 3 were read'):
            cached_clouds(where, 'things', {}, [], tmp_path, lambda: clouds, total, 10)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_it_is_read_once(source):
    source.open()
    source.open()
    assert source.reads == 1 and len(folders(source)) == 1


@pytest.mark.parametrize('change', [
    lambda s: np.save(s.root / '3.npy', np.ones((4, 4), np.float32)), lambda s: (s.root / '1.npy').unlink(),
    lambda s: os.utime(s.root / '1.npy', ns=(1, 1)), lambda s: (s.root / '1.npy').rename(s.root / '9.npy')],
    ids=['added', 'removed', 'touched', 'renamed'])
def test_changed_sources_replace_it(source, change):
    source.open()
    change(source)
    clouds = source.open()
    assert source.reads == 2 and len(folders(source)) == 1 and len(clouds) == len(list(source.root.iterdir()))


def test_changed_settings_get_one_of_their_own(source):
    source.open()
    for kwargs in (dict(max_points=9), dict(settings=dict(normals=True)), dict(settings=dict(mesh_seed=1))):
        source.open(**kwargs)
    source.open()
    assert source.reads == 4 and len(folders(source)) == 4


def test_the_order_of_the_sources_counts(source):
    forward = [cloud.copy() for cloud in source.open()]
    source.order = -1
    backward = source.open()
    assert source.reads == 2 and all(np.array_equal(a, b) for a, b in zip(forward, reversed(list(backward))))


def test_what_killed_writers_left_is_removed_and_others_are_not(source):
    source.open()
    name, = folders(source)
    stem = name.rpartition('-')[0]
    for left in (f'.writing-{stem}-0-1', '.writing-other-0-1', f'{stem[:-1]}x-0'):
        (source.cache / left).mkdir()
    (source.root / '1.npy').unlink()
    source.open()
    now = folders(source)
    assert len(now) == 3 and name not in now and f'.writing-{stem}-0-1' not in now


@pytest.mark.parametrize('damage', [
    lambda f: (f / 'points.f32').write_bytes(b'abc'), lambda f: (f / 'meta.json').unlink(),
    lambda f: (f / 'offsets.npy').write_bytes(b''), lambda f: (f / 'meta.json').write_text('{}'),
    lambda f: (f / 'points.f32').unlink()])
def test_a_damaged_one_is_written_again(source, damage):
    expected = [cloud.copy() for cloud in source.open()]
    damage(source.cache / folders(source)[0])
    clouds = source.open()
    assert source.reads == 2 and all(np.array_equal(a, b) for a, b in zip(clouds, expected))


def test_a_failure_leaves_nothing_behind(source):
    np.save(source.root / '4.npy', np.ones((4, 3), np.float32))  # another number of columns
    with pytest.raises(ValueError, match='things: cloud 3 has 3 columns, the ones before it have 4'):
        source.open()
    assert folders(source) == []


def test_writers_at_the_same_time_agree(source):
    results, errors = [], []

    def work():
        try:
            results.append(source.open())
        except Exception as error:
            errors.append(error)
    threads = [threading.Thread(target=work) for _ in range(6)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not errors and len(folders(source)) == 1 and len(results) == 6
    assert all(np.array_equal(results[0][i], other[i]) for other in results for i in range(3))


def test_a_folder_that_cannot_be_written_says_what_to_do(source):
    source.cache.write_text('a file, not a folder')
    with pytest.raises(OSError, match='cache_dir'):
        source.open()


def test_pickling_sends_the_path_not_the_points(source):
    import pickle
    clouds = source.open()
    sent = pickle.dumps(clouds)
    assert clouds[1].tobytes()[:40] not in sent
    assert np.array_equal(pickle.loads(sent)[1], clouds[1])
    assert isinstance(clouds, Clouds)


def test_fps_order_repeats_no_point():
    cloud = np.repeat(np.eye(3, dtype=np.float32), 4, axis=0)  # 12 points in 3 places
    order, = fps_order([cloud], 8)
    assert len(set(order.tolist())) == 8 and {tuple(p) for p in cloud[order[:3]]} == {tuple(p) for p in np.eye(3)}
    order, = fps_order([cloud], 100)
    assert sorted(order) == list(range(12))
    order, = fps_order([np.zeros((5, 3), np.float32)], 5)
    assert sorted(order) == list(range(5))


def test_fps_order_of_mixed_sizes_is_that_of_each_alone():
    rng = np.random.default_rng(0)
    clouds = [rng.normal(size=(n, 3)).astype(np.float32) for n in (30, 10, 30, 7)]
    for one, together in zip(clouds, fps_order(clouds, 20)):
        assert np.array_equal(fps_order([one], 20)[0], together) and len(together) == min(20, len(one))
