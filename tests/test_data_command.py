"""``ewa3d data check`` and ``convert``: on generated folders, whole and damaged."""
import numpy as np
import pytest

from ewa3d import cli
from ewa3d.datasets import survey as module
from ewa3d.datasets.cache import without_cache
from ewa3d.datasets.survey import survey
from ewa3d.registry import DATASETS


@pytest.fixture
def folder(tmp_path):
    """Four clouds of 80 points in two classes, and one of 40."""
    rng = np.random.default_rng(0)
    for name, count in (('apple', 2), ('pear', 3)):
        (tmp_path / 'fruit' / name).mkdir(parents=True)
        for i in range(count):
            size = 40 if (name, i) == ('pear', 2) else 80
            np.save(tmp_path / 'fruit' / name / f'{i}.npy', rng.normal(size=(size, 3)))
    return tmp_path / 'fruit'


def config(folder, path, **more):
    data = dict(dict(type='FolderPointCloud', data_root=str(folder), cache_dir=str(path / 'cache'), pipeline=[
        dict(type='Resample', num_points=64), dict(type='Pack')]), **more)
    (path / 'config.py').write_text(f'model = dict()\ntrain_dataloader = dict(dataset={data!r})\n'
                                    f'val_dataloader = test_dataloader = train_dataloader\n')
    return str(path / 'config.py'), data


def test_check(folder, tmp_path, capsys):
    path, data = config(folder, tmp_path)
    assert cli.main(['data', 'check', path]) == 1
    out = capsys.readouterr().out
    assert out.count('_dataloader') == 1  # the same data set is told once
    assert "train_dataloader.dataset=dict(type='FolderPointCloud'" in out and 'pipeline' not in out
    assert 'samples: 5' in out and 'points a cloud: 40 to 80, median 80' in out
    assert 'wrong: 1 clouds have fewer than the 64 points' in out and "pad='repeat'" in out
    found = survey(data)
    assert found.labels == dict(apple=2, pear=3) and found.points == (40, 80, 80) and found.cache.is_dir()
    data['pipeline'][0]['pad'] = 'repeat'
    found = survey(data)
    assert not found.problems and len(found.notes) == 1 and 'nothing is wrong' in str(found)


def test_a_folder_alone(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(['data', 'check', str(folder)]) == 0
    out = capsys.readouterr().out
    assert f"train_dataloader.dataset=dict(type='FolderPointCloud', data_root={str(folder)!r}, split='train')" in out


@pytest.mark.parametrize(('damage', 'text'), [
    (lambda f: np.save(f / 'apple' / '1.npy', np.full((9, 3), np.nan)), '1.npy: 9 of 9 points have NaN'),
    (lambda f: (f / 'pear' / '0.npy').write_bytes(b'x'), '0.npy: cannot be read'),
    (lambda f: np.save(f / 'pear' / '0.npy', np.zeros((3, 3))), '1 clouds whose points are all in one place: pear'),
    (lambda f: (f / 'plum').mkdir(), 'plum: an empty class folder'),
    (lambda f: [file.unlink() for file in f.glob('*/*')], 'apple: an empty class folder'),
    (lambda f: f.rename(f.parent / 'gone'), 'there is no folder'),
])
def test_what_is_wrong_is_told(folder, tmp_path, damage, text):
    damage(folder)
    _, data = config(folder, tmp_path)
    assert any(text in problem for problem in survey(data).problems), survey(data).problems


def test_files_that_are_read_one_by_one_are_all_told(tmp_path):
    from ewa3d.datasets import PointDataset

    class Own(PointDataset):
        METAINFO = dict(classes=('a', 'b', 'c'))  # noqa: RUF012

        def load_data_list(self):
            return [dict(path=tmp_path / f'{i}.npy', label=i % 2) for i in range(9)]

    for i in range(9):
        if i:
            np.save(tmp_path / f'{i}.npy', np.full((5, 3), np.nan) if i > 1 else np.random.rand(5, 4))
    found = survey(dict(type=Own, split=None))
    assert len(found.problems) == module.NAMED + 1 and 'and 3 more' in found.problems[-1]
    assert found.notes == ['no samples of c'] and found.labels == dict(a=5, b=4, c=0)


def test_without_a_cache(folder, tmp_path):
    _, data = config(folder, tmp_path)
    found = survey(data, cache=False)
    assert found.samples == 5 and found.points == (40, 80, 80) and found.labels == dict(apple=2, pear=3)
    assert found.cache is None and not (tmp_path / 'cache').exists()
    with without_cache():
        clouds = DATASETS.build(dict(data, indices=[3]))
    assert len(clouds.raw(0)['points']) == 80
    with pytest.raises(IndexError, match='was handed out already'):
        clouds.raw(0)
    np.save(folder / 'apple' / '1.npy', np.full((9, 3), np.nan))
    found = survey(data, cache=False)
    assert any('apple/1.npy: 9 of 9 points have NaN' in problem for problem in found.problems)


def test_boxes_are_counted():
    found = survey(dict(type='SyntheticScenes', split='val', num_samples=3))
    assert list(found.boxes) == ['bed', 'chair', 'desk', 'shelf', 'sofa', 'table'] and sum(found.boxes.values()) > 3
    assert f'boxes: {sum(found.boxes.values())}' in str(found) and '█' in str(found)


def test_counts_of_published_data(monkeypatch):
    cfg = dict(type='SyntheticShapes', split='test', num_samples=26, num_points=32)
    for whole, kind in ((30, 'notes'), (20, 'problems')):
        monkeypatch.setitem(module.SIZES, ('SyntheticShapes', None), dict(test=whole))
        found = survey(cfg)
        assert f'26 samples, the whole has {whole}' in getattr(found, kind) and found.expected == whole
    assert not survey(dict(cfg, indices=5)).problems
    for name, _ in module.SIZES:
        assert name in DATASETS


def test_convert(folder, tmp_path, capsys):
    path, _ = config(folder, tmp_path)
    assert cli.main(['data', 'convert', path]) == 0
    cache = next(p for p in (tmp_path / 'cache').iterdir() if p.is_dir())
    assert str(cache) in capsys.readouterr().out
    before = (cache / 'points.f32').stat().st_mtime_ns
    assert cli.main(['data', 'convert', path, '--split', 'train']) == 0
    assert (cache / 'points.f32').stat().st_mtime_ns == before
    assert cli.main(['data', 'convert', 'quickstart/plain', '--split', 'test', '--cfg-options',
                     'test_dataloader.dataset.num_samples=13']) == 0
    assert 'is read as it is' in capsys.readouterr().out


@pytest.mark.parametrize(('argv', 'text'), [
    (['data', 'check', 'nothing'], "no data set, config or folder 'nothing'; data sets: modelnet40"),
    (['data', 'check', 'modelnet'], "did you mean 'modelnet40'"),
    (['data', 'check', 'no/thing'], 'no/thing does not exist'),
    (['data', 'convert', 'nothing.py'], 'nothing.py'),
    (['data', 'check', 'CONFIG', '--cfg-options', 'train_dataloader.dataset.type=FolderPoints'], 'FolderPointCloud'),
])
def test_mistakes(folder, tmp_path, capsys, argv, text):
    path, _ = config(folder, tmp_path)
    assert cli.main([path if word == 'CONFIG' else word for word in argv]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count('\n') == 1


def test_the_verbs_are_listed(capsys):
    assert cli.main(['data']) == 2
    assert 'check' in capsys.readouterr().out
