"""Folders of very many files are listed without asking the disk about each; links in circles, names of any kind."""
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from engine_toys import on_cpu, toy_config  # noqa: F401
from PIL import Image

from ewa3d.datasets import FolderPointCloud, ImageFolder, folder
from ewa3d.datasets.base import shared_ids
from ewa3d.datasets.fingerprint import fingerprint
from ewa3d.engine.runner import Runner

LIMIT = 1 << 10  # bytes of memory a file, while it is listed


class Counted:
    """Counts the calls that ask the disk."""

    def __init__(self, monkeypatch):
        self.calls = dict.fromkeys(('stat', 'lstat', 'scandir', 'listdir', 'getcwd', 'readlink'), 0)
        for name in self.calls:
            monkeypatch.setattr(os, name, self._counting(name, getattr(os, name)))

    def _counting(self, name, function):
        def count(*args, **kwargs):
            self.calls[name] += 1
            return function(*args, **kwargs)
        return count


def many(root: Path, suffix: str, number: int) -> Path:
    """Two classes of hard links to one file each."""
    for name in ('one', 'two'):
        (root / name).mkdir(parents=True)
        first = root / name / f'{0:06d}{suffix}'
        if suffix == '.npy':
            np.save(first, np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
        else:
            Image.new('RGB', (2, 2)).save(first)
        for i in range(1, number // 2):
            os.link(first, root / name / f'{i:06d}{suffix}')
    return root


def list_both(tmp_path, number: int, monkeypatch) -> None:
    clouds, images = many(tmp_path / 'clouds', '.npy', number), many(tmp_path / 'images', '.png', number)
    counted = Counted(monkeypatch)
    data = ImageFolder(images)
    assert len(data) == number and len(fingerprint(data)['content']) == 8
    assert sum(counted.calls.values()) < 60, counted.calls  # of the folders, and of the samples of the fingerprint
    tracemalloc.start()
    found = [(file, 0) for name in folder.Tree(clouds).classes for part in folder.Tree(clouds).folders(name, None)
             for file in FolderPointCloud._files(FolderPointCloud.__new__(FolderPointCloud), part)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == number and peak < LIMIT * number
    print(f'\n{number} files in two folders: {sum(counted.calls.values())} calls, {peak / number:.0f} bytes a file')


def test_listing(tmp_path, monkeypatch):
    monkeypatch.setattr(FolderPointCloud, 'extensions', None, raising=False)
    list_both(tmp_path, 3000, monkeypatch)


def test_one_look_at_each_file_that_goes_into_a_cache(tmp_path, monkeypatch):
    """Its size and modification time are part of the cache's name."""
    root = many(tmp_path / 'clouds', '.npy', 400)
    FolderPointCloud(root, cache_dir=tmp_path / 'cache')
    counted = Counted(monkeypatch)
    assert len(FolderPointCloud(root, cache_dir=tmp_path / 'cache')) == 400
    assert counted.calls['stat'] < 1.2 * 400 and sum(counted.calls.values()) < 1.3 * 400, counted.calls


@pytest.mark.reliability
def test_a_hundred_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr(FolderPointCloud, 'extensions', None, raising=False)
    list_both(tmp_path, 100_000, monkeypatch)
    monkeypatch.undo()
    data = FolderPointCloud(tmp_path / 'clouds', cache_dir=tmp_path / 'cache')
    assert len(data) == 100_000 and data[99_999]['points'].shape == (4, 3)
    print(f'read into a cache of {sum(f.stat().st_size for f in (tmp_path / "cache").rglob("*") if f.is_file())} bytes')


# ---- links and names ------------------------------------------------------------------------------------------------
def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))


@pytest.mark.parametrize(('link', 'target', 'match'), [
    ('a/loop', '.', 'a folder inside a class'), ('a/up', '..', 'a folder inside a class'),
    ('a/self', 'self', 'a link to nothing'), ('self', 'self', None)])
def test_links_in_circles(tmp_path, link, target, match):
    for name in 'ab':
        put(tmp_path / name / 'x.npy')
    (tmp_path / link).symlink_to(target)
    if match is None:
        assert len(FolderPointCloud(tmp_path, cache_dir=None)) == 2  # it is no folder
        return
    with pytest.raises(ValueError, match=match) as caught:
        FolderPointCloud(tmp_path, cache_dir=None)
    assert str(tmp_path / link) in str(caught.value)


def test_a_link_to_the_folder_above_beside_the_classes(tmp_path):
    for name in 'ab':
        put(tmp_path / name / 'x.npy')
    (tmp_path / 'loop').symlink_to('.')
    with pytest.raises(ValueError, match='loop'):
        FolderPointCloud(tmp_path, cache_dir=None)


def test_any_name(tmp_path):
    """Spaces, quotes, umlauts, Chinese, an emoji and a line feed, in every path of a run."""
    root = tmp_path / 'Daten für "alle" 点云'
    for split in ('train', 'test'):
        for name in ("l'été", '椅子 🪑'):
            for i in range(4):
                put(root / split / name / f'wolke {i}\n (kopie).npy')
    cfg = toy_config(tmp_path / 'work dir ü', epochs=1)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader']['dataset'] = dict(
            type='FolderPointCloud', data_root=str(root), split='train' if split == 'train' else 'test',
            cache_dir=str(tmp_path / 'cache é'), pipeline=[dict(type='Resample', num_points=32), dict(type='Pack')])
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert (tmp_path / 'work dir ü' / 'epoch_1.pth').is_file()
    assert runner.train_dataloader.dataset.metainfo['classes'] == ("l'été", '椅子 🪑')


def test_the_same_files_in_two_splits(tmp_path):
    """Through links, which is how splits are often made: the names are those of different files."""
    for name in 'ab':
        put(tmp_path / name / 'x.npy')
    one, other = (FolderPointCloud(tmp_path, None, cache_dir=None) for _ in range(2))
    assert shared_ids([one], [other]) == ['a/x.npy', 'b/x.npy']
