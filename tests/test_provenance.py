"""What a result came from: fingerprints of the data, the state of the code, and warnings where they differ."""
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from engine_toys import ToyClouds, on_cpu, toy_config  # noqa: F401
from torch.utils.data import ConcatDataset

from ewa3d import cli
from ewa3d.datasets import FolderPointCloud, ImageFolder, SyntheticShapes, cache
from ewa3d.datasets.fingerprint import differences, fingerprint
from ewa3d.datasets.mixed import MixedDataset
from ewa3d.datasets.videos import VideoDataset
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.provenance import changed_data, git_state, train_fingerprint
from ewa3d.engine.runner import Runner


def write_clouds(root, splits=('train', 'test'), count=6):
    for k, split in enumerate(splits):
        for c, name in enumerate(('box', 'ring')):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                rng = np.random.default_rng((k, c, i))
                np.save(root / split / name / f'é {i}.npy', rng.normal(size=(40, 3)).astype(np.float32))
    return root


def folder(root, split='train', **options):
    return FolderPointCloud(root, split, cache_dir=None, **options)


# ---- fingerprints ---------------------------------------------------------------------------------------------------
def test_it_is_the_same_elsewhere(tmp_path):
    """Another folder, other modification times, through a cache, after JSON."""
    write_clouds(tmp_path / 'a')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b' / 'c')
    for path in (tmp_path / 'b').rglob('*.npy'):
        os.utime(path, (1, 1))
    one = fingerprint(folder(tmp_path / 'a'))
    assert json.loads(json.dumps(one)) == one and str(tmp_path) not in json.dumps(one)
    assert one == fingerprint(folder(tmp_path / 'b' / 'c'))
    assert one == fingerprint(FolderPointCloud(tmp_path / 'a', cache_dir=tmp_path / 'cache'))
    assert one['samples'] == 12 and len(one['content']) == 8 and not differences(one, one)


def test_other_data_are_told(tmp_path):
    root = write_clouds(tmp_path / 'a')
    before = fingerprint(folder(root))
    for change, expected in [
            (lambda f: np.save(f, np.load(f) * 1.01), r'what samples hold \(train/box/é 0.npy\), points of train/'),
            (lambda f: np.save(f, np.load(f)[:-1]), r'points of train/box/é 0.npy: \[\[40, 3\], .* \[\[39, 3\]'),
            (lambda f: f.rename(f.with_name('other.npy')), 'the names of the samples'),
            (lambda f: f.unlink(), 'samples: 12 then, 11 now; the names')]:
        shutil.rmtree(tmp_path / 'b', ignore_errors=True)
        shutil.copytree(root, tmp_path / 'b')
        change(tmp_path / 'b' / 'train' / 'box' / 'é 0.npy')
        found = '; '.join(differences(before, fingerprint(folder(tmp_path / 'b'))))
        assert re.search(expected, found), found
    swapped = fingerprint(folder(root, classes=['ring', 'box']))
    text = '; '.join(differences(before, swapped))
    assert 'the classes' in text and 'the labels' in text and 'names' not in text
    assert differences(before, fingerprint(folder(root, indices=[0, 5])))


def test_last_digits_do_not_matter(tmp_path):
    root = write_clouds(tmp_path / 'a')
    before = fingerprint(folder(root))
    for path in root.rglob('*.npy'):
        np.save(path, np.load(path) * np.float32(1 + 1e-6))
    assert fingerprint(folder(root)) != before and not differences(before, fingerprint(folder(root)))


def test_a_split_of_images_of_videos_and_of_others(tmp_path):
    from PIL import Image
    for name in 'ab':
        (tmp_path / 'images' / name).mkdir(parents=True)
        (tmp_path / 'videos' / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(tmp_path / 'images' / name / f'{i}.png')
            (tmp_path / 'videos' / name / f'{i}.mp4').write_bytes(bytes(100_000) + bytes([i]))
    images, videos = ImageFolder(tmp_path / 'images'), VideoDataset(tmp_path / 'videos')
    assert fingerprint(images)['content']['a/1.png']['img'] == [[8, 8, 3], [40., 0.]]
    before = fingerprint(videos)
    (tmp_path / 'videos' / 'b' / '1.mp4').write_bytes(bytes(100_000) + b'x')
    assert 'path of b/1.mp4: 100001 bytes' in '; '.join(differences(before, fingerprint(VideoDataset(
        tmp_path / 'videos'))))
    (tmp_path / 'images' / 'a' / '0.png').write_bytes(b'no image')
    assert fingerprint(ImageFolder(tmp_path / 'images'))['content']['a/0.png'] == dict(error='cannot be read')

    mixed = fingerprint(MixedDataset(dict(a=images, b=SyntheticShapes(num_samples=3, num_points=8))))
    other = fingerprint(MixedDataset(dict(a=images, b=SyntheticShapes(num_samples=4, num_points=8))))
    assert any(text.startswith('part 1: samples: 3 then, 4 now') for text in differences(mixed, other))
    assert [part['samples'] for part in fingerprint(ConcatDataset([ToyClouds(), ToyClouds(3)]))['parts']] == [24, 3]
    assert differences(fingerprint(ToyClouds()), fingerprint(ToyClouds(classes=['a', 'b'])))


def test_like_is_compared_with_like():
    splits = {split: fingerprint(SyntheticShapes(split=split, num_samples=6, num_points=8))
              for split in ('train', 'val', 'test')}
    assert not changed_data(splits, dict(test=splits['val'])) and not changed_data({}, splits)
    other = fingerprint(SyntheticShapes(split='val', num_samples=5, num_points=8))
    text, = changed_data(splits, dict(test=other))
    assert text.startswith('the test data are not those that the training recorded: samples: 6 then, 5 now')


@pytest.mark.parametrize('odd', [3, [], {}, 'x' * 5000, dict(a=3), [[1], ['x']], [[40, 3], [None] * 6]])
def test_what_a_file_recorded_may_be_anything(tmp_path, odd):
    now = fingerprint(folder(write_clouds(tmp_path / 'a')))
    name = next(iter(now['content']))
    for then in (dict(content=odd), dict(parts=odd), dict(names=odd), dict(content={name: odd}),
                 dict(content={name: dict(points=odd)})):
        text, = changed_data(dict(train={**now, **then}, test=odd, val=None), dict(train=now)) or ['']
        assert len(text) < 2500


def test_nothing_is_prepared_for_it(tmp_path):
    root = write_clouds(tmp_path / 'a')
    cfg = dict(dataset=dict(type='FolderPointCloud', data_root=str(root), cache_dir=str(tmp_path / 'cache')))
    assert train_fingerprint(cfg) is None and not (tmp_path / 'cache').exists()
    FolderPointCloud(root, cache_dir=tmp_path / 'cache')
    assert train_fingerprint(cfg) == fingerprint(folder(root))
    for other in (None, dict(dataset=dict(type='FolderPointCloud', data_root=str(tmp_path / 'nowhere'))),
                  dict(dataset={**cfg['dataset'], 'on_error': 'skip'}), dict(dataset={**cfg['dataset'],
                                                                                      'cache_dir': None})):
        assert train_fingerprint(other) is None
    assert not cache._only_prepared.get()


def test_the_state_of_a_checkout(tmp_path):
    assert git_state(tmp_path) is None
    run = lambda *args: subprocess.run(  # noqa: E731
        ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *args], cwd=tmp_path, check=True, capture_output=True)
    run('init'), (tmp_path / 'a').write_text('1'), run('add', 'a'), run('commit', '-m', 'one')
    state = git_state(tmp_path)
    assert len(state['commit']) == 40 and state['changed'] == []
    (tmp_path / 'a').write_text('2')
    assert git_state(tmp_path) == dict(commit=state['commit'], changed=['a'])


# ---- a run ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A folder with ``data``, ``config.py`` and ``run``."""
    here = tmp_path_factory.mktemp('provenance')
    cfg = toy_config('x', epochs=1)
    write_clouds(here / 'data', ('train', 'val', 'test'))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader']['dataset'] = dict(
            type='FolderPointCloud', data_root=str(here / 'data'), split=split, cache_dir=str(here / 'cache'),
            pipeline=[dict(type='Resample', num_points=32), dict(type='Pack')])
    del cfg['work_dir']
    (here / 'config.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.items()))
    assert cli.main(['train', str(here / 'config.py'), '--work-dir', str(here / 'run')]) == 0
    return here


def test_what_a_run_records(run):
    meta = read_checkpoint(run / 'run' / 'epoch_1.pth')['meta']
    environment = json.loads((run / 'run' / 'environment.json').read_text())
    for record in (meta, environment):
        assert record['data'] == {split: fingerprint(folder(run / 'data', split)) for split in ('train', 'val', 'test')}
        assert record['seed'] == 0 and record['versions']['torch'] and isinstance(record['git'], dict)


def evaluated(run, out, *options) -> tuple[dict, str]:
    assert cli.main(['test', str(run / 'config.py'), str(run / 'run' / 'epoch_1.pth'), '--work-dir', str(out),
                     *options]) == 0
    return json.loads((out / 'metrics.json').read_text()), (out / 'test.log').read_text()


def test_a_test_on_other_data_warns(run, tmp_path):
    result, log = evaluated(run, tmp_path / 'same')
    assert 'changed_data' not in result and 'not those that' not in log
    moved = tmp_path / 'moved'
    shutil.copytree(run / 'data', moved)
    options = ['--cfg-options', *(f'{split}_dataloader.dataset.data_root={moved}' for split in ('train', 'test'))]
    assert 'changed_data' not in evaluated(run, tmp_path / 'moved out', *options)[0]
    np.save(moved / 'test' / 'ring' / 'é 5.npy', np.ones((40, 3), np.float32))
    result, log = evaluated(run, tmp_path / 'changed', *options)
    assert len(result['changed_data']) == 1 and 'the test data are not those that the training recorded' in log
    assert 'points of test/ring/é 5.npy' in log and '[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]' in log
    (moved / 'train' / 'box' / 'é 0.npy').unlink()
    FolderPointCloud(moved, cache_dir=run / 'cache')  # prepared: the training data are at hand
    _, log = evaluated(run, tmp_path / 'both', *options)
    assert 'the train data are not those that the training recorded: samples: 12 then, 11 now' in log


def test_a_run_that_goes_on_with_other_data_warns(run, tmp_path):
    shutil.copytree(run, tmp_path / 'copy')
    (tmp_path / 'copy' / 'data' / 'val' / 'box' / 'é 0.npy').unlink()
    text = (tmp_path / 'copy' / 'config.py').read_text().replace(str(run), str(tmp_path / 'copy'))
    (tmp_path / 'copy' / 'config.py').write_text(text)
    work_dir = tmp_path / 'copy' / 'run'
    assert cli.main(['train', str(tmp_path / 'copy' / 'config.py'), '--resume', '--work-dir', str(work_dir),
                     '--cfg-options', 'train_cfg.max_epochs=2']) == 0
    assert ('the val data are not those that the training recorded: samples: 12 then, 11 now'
            in (work_dir / 'train.log').read_text())


def test_data_that_a_test_cannot_read_yet(tmp_path):
    cfg = toy_config(tmp_path, epochs=1)
    cfg['test_dataloader']['dataset'] = dict(type='FolderPointCloud', data_root=str(tmp_path / 'nowhere'))
    Runner.from_cfg(cfg).train()
    assert set(read_checkpoint(tmp_path / 'epoch_1.pth')['meta']['data']) == {'train', 'val'}
    assert 'the data of the test cannot be read' in (tmp_path / 'train.log').read_text()
