"""ModelNet in each layout, generated and real; bad files of each."""
import os
import pickle

import h5py
import numpy as np
import pytest

from ewa3d.datasets import ModelNet
from ewa3d.datasets.modelnet import CLASSES

PACKED = [dict(type='Normalize'), dict(type='Resample', num_points=32), dict(type='Pack')]
TETRAHEDRON = 'OFF4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n'


def rows(seed, n=40):
    return np.random.default_rng(seed).normal(size=(n, 6)).astype(np.float32)


def txt_layout(root, variant=40, shapes=(('train', 'chair_0001', 0), ('train', 'night_stand_0002', 1),
                                         ('test', 'chair_0003', 2)), names=None):
    (root / f'modelnet{variant}_shape_names.txt').write_text('\n'.join(names or CLASSES[variant]) + '\n')
    for split in ('train', 'test'):
        listed = [name for s, name, _ in shapes if s == split]
        (root / f'modelnet{variant}_{split}.txt').write_text('\n'.join(listed) + '\n\n')
    for _, name, seed in shapes:
        folder = root / name.rpartition('_')[0]
        folder.mkdir(exist_ok=True)
        np.savetxt(folder / f'{name}.txt', rows(seed), delimiter=',', fmt='%.6f')
    return root


def h5_layout(root, prefix='', normals=True, labels=((0, 2), (1,), (9,)), names=None):
    if names:
        (root / 'shape_names.txt').write_text('\n'.join(names))
    for i, part in enumerate(('train0', 'train1', 'test0')):
        with h5py.File(root / f'ply_data_{part}.h5', 'w') as file:
            clouds = np.stack([rows(10 * i + j) for j in range(len(labels[i]))])
            file['data'], file['label'] = clouds[..., :3], np.array(labels[i], np.uint8).reshape(-1, 1)
            if normals:
                file['normal'] = clouds[..., 3:]
    (root / 'train_files.txt').write_text(f'{prefix}ply_data_train0.h5\n{prefix}ply_data_train1.h5\n')
    (root / 'test_files.txt').write_text(f'{prefix}ply_data_test0.h5\n')
    return root


def off_layout(root):
    for path in ('bathtub/train/bathtub_0001', 'bathtub/test/bathtub_0002', 'toilet/train/toilet_0001'):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / f'{path}.off').write_text(TETRAHEDRON)
    return root


def dat_layout(root, content=None, split='train'):
    content = content or [[rows(0), rows(1)], [np.array([8], np.int32), np.array([3], np.int32)]]
    (root / f'modelnet40_{split}_8192pts_fps.dat').write_bytes(pickle.dumps(content))
    return root


@pytest.fixture
def make(tmp_path):
    """``make(variant=10, ...)``: ModelNet on the generated folder, with a cache of its own."""
    (tmp_path / 'source').mkdir()
    make = lambda **kwargs: ModelNet(tmp_path / 'source', cache_dir=tmp_path / 'cache', **kwargs)  # noqa: E731
    make.root = tmp_path / 'source'
    return make


def same_set(a, b):
    return np.allclose(sorted(a.tolist()), sorted(b.tolist()), atol=1e-6)


def is_fps_ordered(points):
    xyz = points[:, :3].astype(np.float64)
    nearest = np.full(len(xyz), np.inf)
    for i in range(1, len(xyz)):
        nearest = np.minimum(nearest, np.square(xyz - xyz[i - 1]).sum(1))
        if nearest[i] < nearest.max() - 1e-5:
            return False
    return True


@pytest.mark.parametrize('normals', [False, True])
@pytest.mark.parametrize('layout', ['auto', 'txt'])
def test_txt(make, normals, layout):
    txt_layout(make.root)
    dataset = make(normals=normals, layout=layout, pipeline=[])
    assert len(dataset) == 2 and len(dataset.metainfo['classes']) == 40 and dataset.metainfo['up_axis'] == 'y'
    assert dataset.metainfo['normals'] is normals
    for i, (label, name) in enumerate(((8, 'chair_0001'), (23, 'night_stand_0002'))):
        sample = dataset[i]
        assert (sample['label'], sample['name'], sample['normals']) == (label, name, normals)
        assert same_set(sample['points'], rows(i)[:, :6 if normals else 3]) and is_fps_ordered(sample['points'])
        assert np.allclose(sample['points'][0], rows(i)[0, :6 if normals else 3], atol=1e-6)
    assert len(make(split='test')) == 1


def test_txt_of_modelnet10_uses_its_own_lists(make):
    txt_layout(make.root, 10)
    dataset = make(variant=10)
    assert dataset.metainfo['classes'] == CLASSES[10] and dataset[1]['label'] == 6


@pytest.mark.parametrize('prefix', ['', 'data/modelnet40_ply_hdf5_2048/', 'data\\modelnet40_ply_hdf5_2048\\'])
@pytest.mark.parametrize('normals', [False, True])
def test_h5(make, prefix, normals):
    h5_layout(make.root, prefix, names=CLASSES[10])
    dataset = make(variant=10, normals=normals)
    assert [dataset[i]['label'] for i in range(3)] == [0, 2, 1] and dataset.metainfo['layout'] == 'h5'
    for i, seed in enumerate((0, 1, 10)):
        assert same_set(dataset[i]['points'], rows(seed)[:, :6 if normals else 3])
    assert dataset[2]['name'] == 'ply_data_train1.h5[0]'


def test_up_axis_of_each_layout(make, tmp_path):
    h5_layout(make.root)
    assert make(variant=10).metainfo['up_axis'] == 'z'
    assert make(variant=40).metainfo['up_axis'] == 'y'
    assert make(variant=40, metainfo=dict(up_axis='z')).metainfo['up_axis'] == 'z'
    (tmp_path / 'off').mkdir()
    assert ModelNet(off_layout(tmp_path / 'off'), variant=10, cache_dir=None).metainfo['up_axis'] == 'z'


@pytest.mark.parametrize('normals', [False, True])
def test_off(make, normals):
    off_layout(make.root)
    dataset = make(variant=10, normals=normals, mesh_points=200, max_points=100)
    assert [dataset[i]['label'] for i in range(2)] == [0, 9] and dataset.metainfo['classes'] == CLASSES[10]
    points = dataset[0]['points']
    assert points.shape == (100, 6 if normals else 3) and is_fps_ordered(points)
    on_a_face = np.minimum(np.abs(points[:, :3]).min(1), np.abs(1 - points[:, :3].sum(1)))
    assert on_a_face.max() < 1e-6
    options = dict(variant=10, normals=normals, mesh_points=200, max_points=100, cache_dir=None)
    again = ModelNet(make.root, **options)
    assert np.array_equal(again[0]['points'], points)
    other = ModelNet(make.root, **options, mesh_seed=1)
    assert not np.array_equal(other[0]['points'], points)


def test_dat_keeps_its_order_and_comes_first(make):
    txt_layout(make.root)
    dat_layout(make.root)
    dataset = make()
    assert dataset.metainfo['layout'] == 'dat' and [dataset[i]['label'] for i in range(2)] == [8, 3]
    assert np.array_equal(dataset[0]['points'], rows(0)[:, :3])
    assert np.array_equal(make(normals=True, max_points=10)[1]['points'], rows(1)[:10])
    assert make(layout='txt').metainfo['layout'] == 'txt'


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Bomb.target),)


def test_a_hostile_dat_is_refused_and_nothing_runs(make, tmp_path):
    Bomb.target = tmp_path / 'ran'
    for content in (Bomb(), [[rows(0)], [Bomb()]], [[Bomb()], [0]]):
        with pytest.raises(ValueError, match=r'fps\.dat.*mkdir'):
            dat_layout(make.root, content)
            make()
    assert not Bomb.target.exists()


@pytest.mark.parametrize('content', [[1, 2, 3], [[rows(0)], []], [[[1, 2]], [0]], [[rows(0)], ['chair']],
                                     [[rows(0)], [np.array([40])]], [[rows(0)], [-1]], {'a': 1}, 5,
                                     [[rows(0)[:, :2]], [0]], [[rows(0) * np.nan], [0]]])
def test_a_dat_of_another_content(make, content):
    dat_layout(make.root, content)
    with pytest.raises(ValueError, match=r'fps\.dat'):
        make()


def test_broken_h5(make):
    h5_layout(make.root, names=CLASSES[10])
    file = make.root / 'ply_data_train1.h5'
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match=r'ply_data_train1\.h5.*cut off'):
        make(variant=10)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r'ply_data_train1\.h5.*train_files\.txt'):
        make(variant=10)


@pytest.mark.parametrize('change, match', [
    (dict(label=np.array([[10]])), 'label 10'), (dict(label=np.array([[-1]])), 'label -1'),
    (dict(label=np.array([0.5])), 'one integer'), (dict(label=np.zeros((1, 2), int)), 'one integer'),
    (dict(label=np.array([1, 2])), "'data' should have"), (dict(data=np.zeros((1, 3))), "'data' should have"),
    (dict(data=np.full((1, 5, 3), np.nan)), r'\[0\].*NaN'), (dict(data=None), "no key 'data'"),
    (dict(label=None), "no key 'label'")])
def test_bad_content_of_an_h5(make, change, match):
    h5_layout(make.root, names=CLASSES[10])
    with h5py.File(make.root / 'ply_data_train1.h5', 'a') as file:
        for key, value in change.items():
            del file[key]
            if value is not None:
                file[key] = value
    with pytest.raises(ValueError, match=match) as error:
        make(variant=10)
    assert 'ply_data_train1.h5' in str(error.value)


def test_normals_that_a_layout_lacks(make, tmp_path):
    h5_layout(make.root, normals=False)
    with pytest.raises(ValueError, match=r"ply_data_train0\.h5: has no key 'normal'"):
        make(variant=10, normals=True)
    (tmp_path / 'b').mkdir()
    txt_layout(tmp_path / 'b')
    np.savetxt(tmp_path / 'b/chair/chair_0001.txt', rows(0)[:, :3], delimiter=',')
    with pytest.raises(ValueError, match=r'chair_0001\.txt.*normals'):
        ModelNet(tmp_path / 'b', normals=True, cache_dir=None)


def test_bad_txt(make):
    txt_layout(make.root)
    (make.root / 'chair/chair_0001.txt').unlink()
    with pytest.raises(FileNotFoundError, match=r'modelnet40_train.txt.*chair_0001\.txt'):
        make()
    (make.root / 'modelnet40_train.txt').write_text('chairs_0001\n')
    with pytest.raises(ValueError, match=r"'chairs_0001'.*'chair'"):
        make()
    (make.root / 'modelnet40_train.txt').write_text('\n')
    with pytest.raises(ValueError, match='empty'):
        make()


@pytest.mark.parametrize('layout', [txt_layout, lambda root: h5_layout(root, names=CLASSES[40])])
def test_lists_as_other_systems_write_them(make, layout):
    layout(make.root)
    plain = make()
    for file in make.root.glob('*.txt'):
        file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes().replace(b'\n', b' \r\n'))
    again = make()
    assert again.labels == plain.labels and again.metainfo == plain.metainfo
    assert all(np.array_equal(a['points'], b['points']) for a, b in zip(plain, again))


def test_lists_with_a_line_twice(make):
    txt_layout(make.root)
    listed = make.root / 'modelnet40_train.txt'
    listed.write_text(listed.read_text() + 'chair_0001\n')
    with pytest.raises(ValueError, match=r"modelnet40_train\.txt: 1 of its lines .*'chair_0001'"):
        make()


def test_bad_off(make):
    off_layout(make.root)
    (make.root / 'toilet/train/toilet_0001.off').write_text('OFF\n4 4 0\n0 0 0\n')
    with pytest.raises(ValueError, match=r'toilet_0001\.off.*cut off'):
        make(variant=10)
    (make.root / 'toilet/train/toilet_0001.off').unlink()
    with pytest.raises(ValueError, match='toilet/train: an empty class folder'):
        make(variant=10)
    with pytest.raises(FileNotFoundError, match='airplane'):
        ModelNet(make.root.parent, variant=40, layout='off', cache_dir=None)


def test_more_classes_than_the_variant_has(make):
    h5_layout(make.root, names=CLASSES[40])
    with pytest.raises(ValueError, match=r'shape_names\.txt.*40 classes.*variant=10'):
        make(variant=10)


@pytest.mark.parametrize('kwargs, match', [
    (dict(variant=20), 'variant'), (dict(variant='10'), 'variant'), (dict(split='val'), "'val'"),
    (dict(split='Train'), "'train'"), (dict(layout='ply'), 'layout'), (dict(max_points=0), 'max_points')])
def test_bad_arguments(make, kwargs, match):
    with pytest.raises(ValueError, match=match):
        make(**kwargs)


def test_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'nowhere.*data/README\.md'):
        ModelNet(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match=r'modelnet40_train\.txt.*train_files\.txt.*off'):
        ModelNet(tmp_path)
    with pytest.raises(FileNotFoundError, match=r'modelnet40_train_\*pts_fps\.dat'):
        ModelNet(tmp_path, layout='dat')


def test_lazy_init_knows_the_classes_and_writes_nothing(make):
    h5_layout(make.root, names=CLASSES[10])
    dataset = make(variant=10, lazy_init=True)
    assert dataset.metainfo['classes'] == CLASSES[10] and not (make.root.parent / 'cache').exists()
    assert len(dataset) == 3 and (make.root.parent / 'cache').exists()


def test_nothing_is_written_beside_the_sources(make):
    h5_layout(make.root)
    before = sorted(make.root.rglob('*'))
    make(variant=10, pipeline=PACKED)
    assert sorted(make.root.rglob('*')) == before


# ---- real data --------------------------------------------------------------------------------------------------
def test_real_modelnet10(dataset_dir):
    root = dataset_dir('modelnet10_ply_hdf5_1024')
    train, test = (ModelNet(root, variant=10, split=split, pipeline=PACKED, cache_dir=dataset_dir() / '.cache')
                   for split in ('train', 'test'))
    assert (len(train), len(test)) == (3991, 908)
    assert train.metainfo['classes'] == CLASSES[10] and train.metainfo['up_axis'] == 'z'
    with h5py.File(root / 'ply_data_test0.h5') as file:
        assert [test._data_list[i]['label'] for i in range(908)] == file['label'][:, 0].tolist()
        raw = file['data'][5]
    points = test[5]['inputs']['points'].numpy()
    assert points.shape == (32, 3)
    cloud = test._clouds[5]
    assert same_set(cloud, raw) and is_fps_ordered(cloud)


def test_real_txt_subset(dataset_dir, tmp_path):
    root = dataset_dir('modelnet40_normal_resampled')
    dataset = ModelNet(root, split='test', normals=True, max_points=64, cache_dir=tmp_path, pipeline=PACKED)
    assert len(dataset) == 29 and len(dataset.metainfo['classes']) == 40
    assert len(ModelNet(root, split='train', max_points=16, cache_dir=tmp_path, lazy_init=True)._list_txt()[0]) == 127
    sample = dataset[0]['inputs']['points']
    assert sample.shape == (32, 6)
    np.testing.assert_allclose(np.linalg.norm(sample[:, 3:], axis=1), 1, atol=1e-2)


def test_real_off_samples(dataset_dir, tmp_path):
    dataset = ModelNet(dataset_dir('modelnet10_off_samples'), variant=10, mesh_points=512, max_points=64,
                       cache_dir=tmp_path, pipeline=PACKED)
    assert len(dataset) == 5 and dataset[4]['inputs']['points'].shape == (32, 3)
