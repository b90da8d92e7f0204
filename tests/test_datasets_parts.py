"""ShapeNetPart in its three layouts, other data in them, transforms that keep parts at their points, bad files."""
import json

import h5py
import numpy as np
import pytest
import torch

from ewa3d.datasets import ShapeNetPart, SyntheticShapes
from ewa3d.datasets.parts import SHAPENET_PARTS
from ewa3d.datasets.transforms import KeepAll, Normalize, Pack, Resample
from ewa3d.registry import TRANSFORMS

OFFICIAL = dict(Airplane='02691156', Mug='03797390', Cap='02954340')  # not in alphabetical order
OWN = dict(Cow='05896765', Sheep='05896766')
SIZES = dict(train=3, val=1, test=2)


def cloud(rng, labels, N):
    """Points whose x tells their label."""
    which = rng.integers(len(labels), size=N)
    which[:len(labels)] = np.arange(len(labels))
    points = rng.standard_normal((N, 6)).round(4)
    points[:, 0] = which
    return points, np.array(labels)[which]


@pytest.fixture
def make(tmp_path):
    """``make(layout, categories, labels)``: a data set in a layout; ``labels`` by category, as in the files."""
    def build(layout, categories=OFFICIAL, labels=None, sizes=SIZES):
        rng, root = np.random.default_rng(3), tmp_path / layout
        root.mkdir()
        rows = '\n'.join(f'{name}\t{synset}' for name, synset in categories.items())
        (root / ('all_object_categories.txt' if layout == 'hdf5' else 'synsetoffset2category.txt')).write_text(rows)
        if labels is None:
            labels = {name: range(1, 1 + len(SHAPENET_PARTS[name])) if layout == 'v0' else SHAPENET_PARTS[name]
                      for name in categories}
        (root / 'train_test_split').mkdir()
        for split, number in sizes.items():
            listed, arrays = [], []
            for i in range(number):
                for label, (name, synset) in enumerate(categories.items()):
                    N = 20 if layout == 'hdf5' else 15 + len(arrays)
                    points, parts = cloud(rng, list(labels[name]), N)
                    arrays.append((points, parts, label))
                    shape = f'{split}{i}'
                    listed.append(f'shape_data/{synset}/{shape}')
                    if layout == 'v0':
                        for folder in ('points', 'points_label'):
                            (root / synset / folder).mkdir(parents=True, exist_ok=True)
                        np.savetxt(root / synset / 'points' / f'{shape}.pts', points[:, :3], '%.4f')
                        np.savetxt(root / synset / 'points_label' / f'{shape}.seg', parts, '%d')
                    elif layout == 'normal':
                        (root / synset).mkdir(exist_ok=True)
                        np.savetxt(root / synset / f'{shape}.txt', np.column_stack([points, parts]), '%.6f')
            if layout == 'hdf5':
                (root / f'{split}_hdf5_file_list.txt').write_text(f'hdf5_data/ply_data_{split}0.h5\n')
                with h5py.File(root / f'ply_data_{split}0.h5', 'w') as file:
                    file['data'] = np.stack([points[:, :3] for points, _, _ in arrays]).astype(np.float32)
                    file['pid'] = np.stack([parts for _, parts, _ in arrays]).astype(np.uint8)
                    file['label'] = np.array([[label] for _, _, label in arrays], np.uint8)
            else:
                (root / 'train_test_split' / f'shuffled_{split}_file_list.json').write_text(json.dumps(listed))
        return root
    return build


def dataset(root, split='train', **options):
    return ShapeNetPart(root, split, **{'cache_dir': None, **options})


# ---- layouts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('layout', ['v0', 'normal', 'hdf5'])
def test_official_categories(make, layout):
    root = make(layout)
    data = dataset(root)
    assert data.metainfo['classes'] == tuple(OFFICIAL) and data.layout == layout and data.metainfo['up_axis'] == 'y'
    assert data.metainfo['parts'] == {name: tuple(SHAPENET_PARTS[name]) for name in OFFICIAL}
    assert len(data) == 9 and data.labels == [0, 1, 2] * 3
    for sample in data:
        ids = SHAPENET_PARTS[list(OFFICIAL)[sample['label']]]
        assert sample['points'].shape == (len(sample['parts']), 3) and sample['points'].dtype == np.float32
        assert sample['parts'].tolist() == [ids[int(x)] for x in sample['points'][:, 0]]
    assert [len(dataset(root, split)) for split in ('val', 'test', 'trainval')] == [3, 6, 12]
    assert dataset(root, 'test')[0]['name'].startswith('ply_data_test0' if layout == 'hdf5' else '02691156/test0')


def test_all_layouts_say_the_same(make):
    sets = [dataset(make(layout)) for layout in ('v0', 'normal')]
    for a, b in zip(*sets):
        np.testing.assert_array_equal(a['points'], b['points'])
        np.testing.assert_array_equal(a['parts'], b['parts'])


@pytest.mark.parametrize('layout, labels', [
    ('v0', dict(Cow=[1, 2, 3], Sheep=[1, 2])), ('normal', dict(Cow=[50, 51, 52], Sheep=[53, 54])),
    ('hdf5', dict(Cow=[0, 1, 2], Sheep=[3, 4]))])
def test_other_data_by_their_path_alone(make, layout, labels):
    root = make(layout, OWN, labels)
    data = dataset(root, 'test')
    assert data.metainfo['parts'] == dict(Cow=(0, 1, 2), Sheep=(3, 4)) and 'up_axis' not in data.metainfo
    for sample in data:
        assert sample['parts'].tolist() == (sample['points'][:, 0] + 3 * sample['label']).tolist()


def test_the_json_of_h5_files_names_parts_that_do_not_occur(make):
    root = make('hdf5', OWN, dict(Cow=[0, 1, 3], Sheep=[4, 5]))
    with pytest.raises(ValueError, match=r"labels of 'Cow' .* the label 3 comes after a gap.*parts=\{'Cow'"):
        dataset(root)
    names = {i: [OWN['Cow' if i < 4 else 'Sheep'], i + 1] for i in range(6)}
    (root / 'overallid_to_catid_partid.json').write_text(json.dumps(names))
    assert dataset(root).metainfo['parts'] == dict(Cow=(0, 1, 2, 3), Sheep=(4, 5))
    (root / 'overallid_to_catid_partid.json').write_text(json.dumps(list(names.values())))
    assert dataset(root, 'val')[1]['parts'].min() == 4
    for content, message in (('[1]', 'number → .synset, part.'), ('[', 'is no JSON')):
        (root / 'overallid_to_catid_partid.json').write_text(content)
        with pytest.raises(ValueError, match=message):
            dataset(root)


def test_categories_and_their_parts_may_be_chosen(make):
    root = make('v0')
    data = dataset(root, categories=['Cap', 'Airplane'])
    assert data.metainfo['classes'] == ('Cap', 'Airplane') and data.labels == [1, 0] * 3
    assert data.metainfo['parts'] == dict(Cap=(6, 7), Airplane=(0, 1, 2, 3)) and set(data[1]['parts']) == {6, 7}
    data = dataset(root, categories=['Cap'], parts=dict(Cap=[1, 2, 9]))
    assert data.metainfo['parts'] == dict(Cap=(0, 1, 2)) and set(data[0]['parts']) == {0, 1}
    h5 = dataset(make('hdf5'), categories=['Mug'])
    assert len(h5) == 3 and h5.labels == [0] * 3 and set(h5[0]['parts']) == {36, 37}


def test_normals(make):
    root = make('normal')
    data = dataset(root, normals=True, pipeline=[Pack(category=True)])
    assert data.metainfo['normals'] and data[0]['inputs']['points'].shape[1] == 6
    with pytest.raises(ValueError, match="normals=True, and the layout 'v0' has none"):
        dataset(make('v0'), normals=True)


def test_lists_elsewhere_and_the_cache(make, tmp_path):
    root = make('v0')
    lists = (root / 'train_test_split').rename(tmp_path / 'lists')
    with pytest.raises(FileNotFoundError, match=r'no list shuffled_train_file_list\.json in .* list_dir='):
        dataset(root)
    first = dataset(root, list_dir=lists, cache_dir=tmp_path / 'cache')
    assert len(list((tmp_path / 'cache').glob('v0_train-*/meta.json'))) == 1
    again = dataset(root, list_dir=lists, cache_dir=tmp_path / 'cache')
    for a, b in zip(first, again):
        np.testing.assert_array_equal(a['points'], b['points'])
        np.testing.assert_array_equal(a['parts'], b['parts'])
    lazy = dataset(root, list_dir=lists, lazy_init=True)
    assert lazy.metainfo['classes'] == tuple(OFFICIAL) and lazy._data_list is None


# ---- transforms -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('step', [
    dict(type='Resample', num_points=9, method='random'), dict(type='Resample', num_points=9, method='fps'),
    dict(type='Resample', num_points=9, method='random', pool=12),
    dict(type='Resample', num_points=50, method='random', pad='repeat'),
    dict(type='Resample', num_points=50, method='random', replace=True),
    dict(type='Resample', num_points=9, method='fps', random_start=True), dict(type='RandomDrop', max_ratio=0.8)])
def test_parts_stay_at_their_points(make, step):
    data = dataset(make('v0'), pipeline=[TRANSFORMS.build(step)])
    for sample in data:
        ids = np.array(SHAPENET_PARTS[list(OFFICIAL)[sample['label']]])
        np.testing.assert_array_equal(sample['parts'], ids[sample['points'][:, 0].astype(int)])
    assert len(sample['points']) == step.get('num_points', len(sample['points']))


def test_drawing_with_repetition():
    results = dict(points=np.arange(30.).reshape(10, 3), rng=np.random.default_rng(0))
    found = Resample(10, 'random', replace=True)(results)['points']
    assert len(found) == 10 and len(np.unique(found, axis=0)) < 10
    for bad in (dict(method='fps'), dict(method='random', pool=20)):
        with pytest.raises(ValueError, match='replace belongs to'):
            Resample(10, replace=True, **bad)


def test_all_points_are_kept_and_packed(make):
    root = make('v0')
    pipeline = [Normalize(), KeepAll(), Resample(7, 'random'), Pack(category=True)]
    for raw, packed in zip(dataset(root), dataset(root, pipeline=pipeline)):
        sample, inputs = packed['data_samples'], packed['inputs']
        assert inputs['points'].shape == (7, 3) and sample.gt_parts.shape == (7,)
        assert sample.gt_all_parts.tolist() == raw['parts'].tolist() and len(sample.all_points) == len(raw['points'])
        assert inputs['category'] == sample.gt_label == raw['label']
        assert torch.equal(sample.all_points[sample.rows], inputs['points'])
        assert torch.equal(sample.gt_all_parts[sample.rows], sample.gt_parts)
    assert set(Pack()(dict(points=np.zeros((2, 3)), label=1))['inputs']) == {'points'}
    for step, message in ((Pack(category=True), 'the sample has no label'), (KeepAll(), 'the sample has no parts')):
        with pytest.raises(ValueError, match=message):
            step(dict(points=np.zeros((2, 3))))


def test_synthetic_shapes_say_their_parts():
    data = SyntheticShapes(26, 64, pipeline=[Pack(category=True)])
    ids = list(data.metainfo['parts'].values())
    assert sum(map(len, ids)) == 34
    for packed in data:
        assert set(packed['data_samples'].gt_parts.tolist()) <= set(ids[packed['inputs']['category']])


# ---- bad files ------------------------------------------------------------------------------------------------------
def edit(root, name, change):
    file = root / name
    file.write_text(change(file.read_text()))
    return file


@pytest.mark.parametrize('layout, file, change, message', [
    ('v0', '02691156/points_label/val0.seg', lambda text: '5\n' + text[2:], r'val0\.seg: point 0 has the label 5, .*'
     "'Airplane': 1, 2, 3, 4"),
    ('v0', '02691156/points_label/val0.seg', lambda text: '0\n' + text[2:], r'val0\.seg: point 0 has the label 0'),
    ('v0', '02691156/points_label/val0.seg', lambda text: text[2:], r'val0\.pts has 15 points and .*val0\.seg 14 la'),
    ('v0', '02691156/points_label/val0.seg', lambda text: text[2:] + '1.5', r'val0\.seg: .*be an integer, got 1'),
    ('v0', '02691156/points_label/val0.seg', lambda text: text + 'x', r'val0\.seg: .*convert'),
    ('v0', '02691156/points_label/val0.seg', lambda text: 'nan\n' + text[2:], r'val0\.seg: .*be an integer, got nan'),
    ('v0', '02691156/points_label/val0.seg', lambda text: '1e30\n' + text[2:], r'val0\.seg: .*an integer, got 1e\+30'),
    ('v0', '02691156/points_label/val0.seg', lambda text: '', r'val0\.pts has 15 points and .*val0\.seg 0 labels'),
    ('v0', '02691156/points/val0.pts', lambda text: text + '1 2\n', r'val0\.pts: '),
    ('v0', '02691156/points/val0.pts', lambda text: '', r'val0\.pts: no row of numbers'),
    ('v0', '02691156/points/val0.pts', lambda text: 'nan 1 2\n' + text.split('\n', 1)[1], r'val0\.pts: .*NaN'),
    ('normal', '02691156/val0.txt', lambda text: text.replace(' 3.000000\n', ' 4.000000\n'), 'val0.txt.*label 4'),
    ('normal', '02691156/val0.txt', lambda text: '1 2 3\n', r'val0\.txt: rows of 7 numbers were expected'),
    ('v0', 'train_test_split/shuffled_val_file_list.json', lambda text: '["x/09999999/a"]',
     r"val_file_list\.json: .*synset '09999999', which .*synsetoffset2category\.txt does not name"),
    ('v0', 'train_test_split/shuffled_val_file_list.json', lambda text: '["x/02691156/../a"]', 'names no shape'),
    ('v0', 'train_test_split/shuffled_val_file_list.json', lambda text: '[3]', 'json: 3 names no shape'),
    ('v0', 'train_test_split/shuffled_val_file_list.json', lambda text: '["a/02691156/b", "02691156/b"]',
     "json: '02691156/b' stands there more than once"),
    ('v0', 'train_test_split/shuffled_val_file_list.json', lambda text: '{"a": 1}', 'should hold a list'),
    ('v0', 'train_test_split/shuffled_val_file_list.json', lambda text: '["a', r'val_file_list\.json: is no JSON'),
    ('v0', 'train_test_split/shuffled_val_file_list.json', lambda text: '["x/02691156/val0", "x/02954340/val0"]',
     r"val_file_list\.json: no shape of the category 'Mug'"),
    ('hdf5', 'val_hdf5_file_list.txt', lambda text: 'other.h5', r'other\.h5: listed in val_hdf5_file_list\.txt'),
    ('v0', 'synsetoffset2category.txt', lambda text: 'Airplane\n', "the row 'Airplane' should be"),
    ('v0', 'synsetoffset2category.txt', lambda text: text + '\nMug 1', "'Mug 1' names .* for the second time"),
    ('v0', 'synsetoffset2category.txt', lambda text: '', 'names no category')])
def test_bad_text(make, layout, file, change, message):
    root = make(layout)
    edit(root, file, change)
    with pytest.raises((ValueError, FileNotFoundError), match=f'(?s){message}'):
        dataset(root, 'val')


@pytest.mark.parametrize('key, change, message', [
    ('pid', lambda x: x + 50, r"val0\.h5\[0\]: point 0 has the label 50, which is none of the parts of 'Airplane'"),
    ('pid', lambda x: x[:, :5], r"val0\.h5: 'pid' has the shape \(3, 5\), 'data' \(3, 20, 3\)"),
    ('label', lambda x: x + 3, r'val0\.h5: label 3 of shape 0 is not one of the 3 classes'),
    ('label', lambda x: x * 0, r"val_hdf5_file_list\.txt: no shape of the category 'Mug'"),
    ('pid', None, r"val0\.h5: has no key 'pid'")])
def test_bad_h5(make, key, change, message):
    root = make('hdf5')
    with h5py.File(root / 'ply_data_val0.h5', 'r+') as file:
        old = file[key][()]
        del file[key]
        if change:
            file[key] = change(old)
    with pytest.raises(ValueError, match=message):
        dataset(root, 'val')


@pytest.mark.filterwarnings('error')
def test_files_as_other_systems_write_them(make):
    root = make('v0')
    expected = [sample['parts'].tolist() for sample in dataset(root)]
    names = ('synsetoffset2category.txt', 'train_test_split/shuffled_train_file_list.json',
             '02691156/points/train0.pts', '02691156/points_label/train0.seg')
    for file in (root / name for name in names):
        file.write_bytes(b'\xef\xbb\xbf' + file.read_bytes().replace(b'\n', b'\r\n'))
    assert [sample['parts'].tolist() for sample in dataset(root)] == expected
    (root / names[-1]).write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r'train0\.seg: a label a row was expected'):
        dataset(root)


def test_labels_that_training_does_not_have(make):
    root = make('v0', OWN, dict(Cow=[1, 2, 3], Sheep=[1, 2]))
    seg = f'{OWN["Cow"]}/points_label/%s.seg'
    edit(root, seg % 'test1', lambda text: '4\n' + text[2:])
    with pytest.raises(ValueError, match=r"test1\.seg: point 0 has the label 4, .*parts of 'Cow': 1, 2, 3"):
        dataset(root, 'test')
    edit(root, seg % 'train0', lambda text: '7\n' + text[2:])
    with pytest.raises(ValueError, match=r"train0\.seg: the labels of 'Cow' should count from 1 .*\[1, 2, 3, 7\]"):
        dataset(root)
    edit(root, seg % 'train0', lambda text: '0\n' + text[2:])
    with pytest.raises(ValueError, match=r'train0\.seg: .*should count from 1 without a gap'):
        dataset(root, 'val')


def test_what_is_not_there(make, tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder'):
        dataset(tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='neither synsetoffset2category'):
        dataset(tmp_path)
    (tmp_path / 'synsetoffset2category.txt').write_text('Mug 03797390')
    with pytest.raises(FileNotFoundError, match=r'no layout of ShapeNetPart.*data/README'):
        dataset(tmp_path)
    root = make('v0')
    (root / '02954340' / 'points' / 'test1.pts').unlink()
    with pytest.raises(FileNotFoundError, match=r'test_file_list\.json: 1 of the 12 files .*first is .*test1\.pts'):
        dataset(root, 'test')
    for options, error, message in ((dict(layout='v1'), ValueError, "no layout 'v1'; did you mean 'v0'"),
                                    (dict(split='valid'), ValueError, "no split 'valid'; did you mean 'val'"),
                                    (dict(categories=['Mugs']), KeyError, "no category 'Mugs'; did you mean 'Mug'"),
                                    (dict(parts=dict(Cop=[1])), KeyError, "no category 'Cop'"),
                                    (dict(categories='Cap'), ValueError, "categories must be a list .* 'Cap'"),
                                    (dict(categories=[]), ValueError, 'categories must be a list of names'),
                                    (dict(parts=dict(Cap=[])), ValueError, r"parts\['Cap'\] must name labels"),
                                    (dict(parts=dict(Cap=['a'])), TypeError, r"parts\['Cap'\] must be an integer")):
        with pytest.raises(error, match=message):
            dataset(root, **options)


# ---- real data ------------------------------------------------------------------------------------------------------
def test_real_shapes(dataset_dir):
    data = dataset(dataset_dir('shapenetcore_partanno_segmentation_benchmark_v0'))
    assert len(data) == 16 and sorted(data.labels) == list(range(16))
    assert data.metainfo['parts'] == {name: tuple(ids) for name, ids in SHAPENET_PARTS.items()}
    for sample in data:
        ids = list(data.metainfo['parts'].values())[sample['label']]
        assert set(sample['parts'].tolist()) <= set(ids) and 2000 < len(sample['points']) < 3000


@pytest.mark.parametrize('name', ['cattle_partanno_v0', 'cattle_hdf5_data'])
def test_cattle(dataset_dir, name):
    sizes = []
    for split in ('train', 'val', 'test'):
        data = dataset(dataset_dir(name), split)
        sizes.append(len(data))
        assert data.metainfo['parts'] == dict(Cattle=(0, 1, 2, 3)) and set(data[0]['parts'].tolist()) <= {0, 1, 2, 3}
    assert sizes == [65, 9, 20]
