"""Samples that cannot be read are left out and counted; samples that two splits share are named."""
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from ewa3d.datasets import FolderPointCloud, PointDataset, SyntheticShapes
from ewa3d.datasets.base import shared_ids
from ewa3d.engine.hooks import DatasetEpochHook


class Files(PointDataset):
    METAINFO: ClassVar[dict] = dict(classes=('a',))

    def load_data_list(self):
        return [dict(path=path, label=0) for path in sorted(self.data_root.iterdir())]


def write_clouds(folder, good: int = 4, bad: int = 2):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(good + bad):
        np.save(folder / f'{i}.npy', np.random.default_rng(i).normal(size=(5, 3)))
    for i in range(bad):
        path = folder / f'{i}.npy'
        path.write_bytes(path.read_bytes()[:-7] if i % 2 else b'')
    return folder


def test_without_the_option_a_bad_file_is_an_error_when_it_is_needed(tmp_path):
    data = Files(write_clouds(tmp_path))
    assert len(data) == 6 and data[2]['points'].shape == (5, 3)
    with pytest.raises(ValueError, match=r'0\.npy'):
        data[0]


def test_bad_files_are_left_out_counted_and_named(tmp_path, caplog):
    with caplog.at_level('WARNING', 'ewa3d'):
        data = Files(write_clouds(tmp_path), on_error='skip')
    assert len(data) == 4 and [data[i]['name'][-5:] for i in range(4)] == ['2.npy', '3.npy', '4.npy', '5.npy']
    assert [name[-5:] for name in data.skipped] == ['0.npy', '1.npy']
    assert '2 of 6 samples cannot be read and are skipped' in caplog.text and caplog.text.count('1.npy') == 1


def test_above_the_limit_it_stops(tmp_path):
    write_clouds(tmp_path)
    with pytest.raises(ValueError, match=r'2 of 6 samples cannot be read, more than max_skipped=0\.3 of .*1\.npy'):
        Files(tmp_path, on_error='skip', max_skipped=0.3)
    with pytest.raises(ValueError, match='6 of 6'):
        Files(write_clouds(tmp_path / 'all', 0, 6), on_error='skip', max_skipped=1)
    for options, match in ((dict(on_error='ignore'), "'raise' or 'skip'"), (dict(max_skipped=2), 'max_skipped')):
        with pytest.raises(ValueError, match=match):
            Files(tmp_path, lazy_init=True, **options)


def test_only_what_is_used_is_read(tmp_path):
    data = Files(write_clouds(tmp_path), on_error='skip', indices=[1, 3, 5])
    assert len(data) == 2 and len(data.skipped) == 1


@pytest.mark.parametrize('cached', [True, False])
def test_files_that_go_into_a_cache(tmp_path, cached, caplog):
    for name in 'ab':
        write_clouds(tmp_path / 'data' / name, 3, 1)
    options = dict(cache_dir=tmp_path / 'cache' if cached else None)
    with pytest.raises(ValueError, match=r'a/0\.npy'):
        FolderPointCloud(tmp_path / 'data', **options)
    for _ in range(2):  # written, then read
        caplog.clear()
        with caplog.at_level('WARNING', 'ewa3d'):
            data = FolderPointCloud(tmp_path / 'data', on_error='skip', **options)
        assert data.labels == [0] * 3 + [1] * 3 and all(len(data[i]['points']) == 5 for i in range(6))
        assert '2 of 8 samples cannot be read and are skipped' in caplog.text


def test_a_missing_package_is_no_bad_data(tmp_path, monkeypatch):
    (tmp_path / 'a.ply').write_text('ply')

    def missing(path):
        raise ImportError('needs open3d')

    monkeypatch.setitem(__import__('ewa3d.datasets.io', fromlist=['READERS']).READERS, '.ply', missing)
    with pytest.raises(ImportError, match='open3d'):
        Files(tmp_path, on_error='skip')


def test_samples_of_both_splits_are_named(tmp_path):
    write_clouds(tmp_path, 6, 0)
    one, other = Files(tmp_path, indices=[0, 1, 2]), Files(tmp_path, split='test', indices=[1, 2, 3])
    names = shared_ids([one], [other])
    assert [name[-5:] for name in names] == ['1.npy', '2.npy'] and not shared_ids([one], [Files(tmp_path, indices=[4])])
    warnings = []
    loader = lambda data: SimpleNamespace(dataset=data)  # noqa: E731
    runner = SimpleNamespace(train_dataloader=loader(one), val_loop=SimpleNamespace(dataloader=loader(other)), seed=0,
                             logger=SimpleNamespace(warning=warnings.append))
    DatasetEpochHook().before_train(runner)
    assert len(warnings) == 1 and warnings[0].startswith('2 samples are in the training and in the validation data')


def test_made_up_samples_share_no_names():
    made = [SyntheticShapes(split=split, num_samples=6, num_points=8) for split in ('train', 'val')]
    assert not shared_ids(made[:1], made[1:]) and not made[0].ids
