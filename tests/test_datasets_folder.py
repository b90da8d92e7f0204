"""FolderPointCloud: trees of any shape, every format, and folders that are wrong."""
import pickle

import h5py
import numpy as np
import pytest

from ewa3d.datasets import FolderPointCloud

CUBE = 'OFF4 4 0\n0 0 0\n1 0 0\n0 1 0\n0 0 1\n3 0 1 2\n3 0 1 3\n3 0 2 3\n3 1 2 3\n'


def points(seed=0, n=30, columns=3):
    return np.random.default_rng(seed).normal(size=(n, columns)).astype(np.float32)


def put(path, seed=0, **kwargs):
    """A cloud in the format of the path's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cloud = points(seed, **kwargs)
    if path.suffix == '.npy':
        np.save(path, cloud)
    elif path.suffix == '.npz':
        np.savez(path, points=cloud)
    elif path.suffix == '.h5':
        with h5py.File(path, 'w') as file:
            file['data'] = cloud
    elif path.suffix == '.off':
        path.write_text(CUBE)
    else:
        np.savetxt(path, cloud, delimiter=',' if path.suffix == '.csv' else ' ')


def tree(root, *names):
    for i, name in enumerate(names):
        put(root / name, i)
    return root


@pytest.fixture
def make(tmp_path):
    """``make(*names, **options)``: files of these names and the data set on them."""
    def make(*names, **options):
        return FolderPointCloud(tree(tmp_path / 'mine', *names), cache_dir=tmp_path / 'cache', **options)
    make.root = tmp_path / 'mine'
    return make


def names(dataset):
    return [dataset[i]['name'] for i in range(len(dataset))]


def test_a_folder_a_class_in_every_plain_format(make):
    formats = ('npy', 'npz', 'txt', 'xyz', 'csv', 'h5', 'off')
    files = [f'{c}/{i}.{e}' for c in ('pear', 'apple') for i, e in enumerate(formats)]
    dataset = make(*files, mesh_points=50)
    assert dataset.metainfo['classes'] == ('apple', 'pear') and dataset.metainfo['up_axis'] == 'z'
    assert names(dataset) == sorted(files) and [dataset[i]['label'] for i in range(14)] == [0] * 7 + [1] * 7
    for i, name in enumerate(files[:6]):
        found = dataset[sorted(files).index(name)]['points']
        assert np.allclose(sorted(found.tolist()), sorted(points(i).tolist()), atol=1e-6), name
    assert dataset[6]['points'].shape == (50, 3)


@pytest.mark.parametrize('form', ['{split}/{name}', '{name}/{split}'])
def test_levels_above_or_below_the_classes(make, form):
    have = {'train': ('a', 'b', 'c'), 'val': ('a', 'b'), 'test': ('b', 'c')}
    files = [form.format(split=split, name=name) + '/x.npy' for split in have for name in have[split]]
    for split, classes in have.items():
        dataset = make(*files, split=split)
        assert dataset.metainfo['classes'] == ('a', 'b', 'c')  # the same for every split
        assert [dataset[i]['label'] for i in range(len(dataset))] == ['abc'.index(c) for c in classes]
    assert len(make(split=None)) == 7


def test_without_levels_everything_is_training_data(make):
    assert len(make('a/1.npy', 'b/1.npy')) == len(make(split=None)) == 2
    for split in ('val', 'test'):
        with pytest.raises(ValueError, match=f"no folders train, val, test.*no split '{split}'"):
            make(split=split)


def test_a_missing_split_says_which_there_are(make):
    with pytest.raises(ValueError, match="no split 'val'; there are train, test"):
        make('train/a/1.npy', 'train/b/1.npy', 'test/a/1.npy', split='val')
    with pytest.raises(ValueError, match=r"'Test'.*'test'"):
        make(split='Test')


def test_clouds_of_any_size_links_and_hidden_files(make):
    put(make.root / 'a/1.npy', n=5)
    put(make.root / 'b/1.npy', n=500)
    (make.root / 'b/.hidden.las').write_text('')
    (make.root / '.git/x').mkdir(parents=True)
    (make.root / 'b/1.png').write_text('')
    (make.root / 'notes.txt').write_text('')
    (make.root / 'c').symlink_to(make.root / 'a')
    dataset = make(max_points=100)
    assert dataset.metainfo['classes'] == ('a', 'b', 'c')
    assert [len(dataset[i]['points']) for i in range(3)] == [5, 100, 5]


def test_upper_case_extensions(make):
    put(make.root / 'b/1.npy')
    put(make.root / 'a/1.npy')
    (make.root / 'a/1.npy').rename(make.root / 'a/1.NPY')
    assert len(make()) == 2


def test_normals_and_features(make):
    for name in 'ab':
        put(make.root / name / '1.txt', columns=7)
        put(make.root / name / '2.off')
    assert make(mesh_points=9)[0]['points'].shape[1] == 3
    dataset = make(normals=True, mesh_points=9)
    assert dataset[0]['points'].shape[1] == 6 and dataset[0]['normals'] and dataset.metainfo['normals']
    with pytest.raises(ValueError, match=r'a/2\.off: 7 columns are wanted.*has 6'):
        make(num_features=4, mesh_points=9)
    with pytest.raises(ValueError, match='num_features=2 must be at least 3'):
        make(normals=True, num_features=2)


def test_classes_may_be_given(make):
    dataset = make('a/1.npy', 'b/1.npy', 'c/1.npy', classes=('c', 'a'))
    assert dataset.metainfo['classes'] == ('c', 'a') and names(dataset) == ['c/1.npy', 'a/1.npy']
    with pytest.raises(ValueError, match="no class folder 'd'"):
        make(classes=('a', 'd'))


def test_only_one_class(make):
    with pytest.raises(ValueError, match=r"only one class, 'a'.*classes=\['a'\]"):
        make('a/1.npy')
    assert len(make(classes=['a'])) == 1


def test_extensions_choose_and_unknown_ones_are_an_error(make):
    tree(make.root, 'a/1.npy', 'a/1.txt', 'b/1.npy')
    (make.root / 'b/2.las').write_text('')
    with pytest.raises(ValueError, match=r"b/2\.las: unknown extension '\.las'.*\.npy.*extensions"):
        make()
    assert names(make(extensions=['.NPY'])) == ['a/1.npy', 'b/1.npy']
    with pytest.raises(ValueError, match=r"'\.las'"):
        make(extensions=['las'])
    with pytest.raises(TypeError, match='list'):
        make(extensions='.npy')


def test_empty_class_folder(make):
    tree(make.root, 'a/1.npy', 'b/1.npy')
    (make.root / 'c').mkdir()
    with pytest.raises(ValueError, match=r'mine/c: an empty class folder.*there are none'):
        make()
    (make.root / 'c/notes.md').write_text('')
    with pytest.raises(ValueError, match=r"mine/c: an empty class folder.*'\.md': 1"):
        make()


def test_no_classes(make, tmp_path):
    make.root.mkdir()
    with pytest.raises(ValueError, match='no class folders'):
        make()
    (make.root / 'train').mkdir()
    with pytest.raises(ValueError, match='no class folders'):
        make()
    with pytest.raises(FileNotFoundError, match=r'nowhere.*data/README\.md'):
        FolderPointCloud(tmp_path / 'nowhere')


def test_mixed_trees(make):
    tree(make.root, 'train/a/1.npy', 'train/b/1.npy', 'chair/1.npy')
    with pytest.raises(ValueError, match="'chair' lies beside 'train'"):
        make()


@pytest.mark.parametrize('path', ['Train/a/1.npy', 'a/TEST/1.npy'])
def test_a_split_in_another_case(make, path):
    tree(make.root, path)
    with pytest.raises(ValueError, match=r"(Train|TEST): .* called '(train|test)'; rename it"):
        make()


def test_levels_below_some_classes_only(make):
    tree(make.root, 'a/train/1.npy', 'a/test/1.npy', 'b/1.npy')
    with pytest.raises(ValueError, match="class 'b' has no folders"):
        make()


@pytest.mark.parametrize('name, content, match', [
    ('bad.npy', b'nonsense', 'cannot be read'), ('bad.h5', b'\x89HDF\r\n\x1a\n', 'HDF5'), ('bad.txt', b'', 'no row'),
    ('bad.txt', b'1 2 nan\n', 'NaN'), ('bad.off', b'OFF\n9 9 9\n', 'cut off'), ('bad.npz', b'PK', 'cannot be read')])
def test_a_file_that_cannot_be_read_is_named(make, name, content, match):
    tree(make.root, 'a/1.npy', 'b/1.npy')
    (make.root / 'b' / name).write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        make()
    assert f'b/{name}' in str(error.value)


def test_a_new_file_is_seen(make):
    assert len(make('a/1.npy', 'b/1.npy')) == 2
    assert len(make('a/2.npy')) == 3


def test_real_pcd_samples(dataset_dir, tmp_path):
    pytest.importorskip('libusb_package')
    try:
        datasets = [FolderPointCloud(dataset_dir('modelnet10_pcd_samples'), split=split, cache_dir=tmp_path)
                    for split in ('train', 'test', None)]
    except ImportError as error:
        pytest.skip(str(error))
    assert [len(d) for d in datasets] == [10, 10, 20] and len(datasets[0].metainfo['classes']) == 10
    assert datasets[0][0]['points'].shape == (1024, 3)


def test_classes_in_another_order_have_caches_of_their_own(make):
    files = [f'{name}/{i}.npy' for name in 'abc' for i in range(2)]
    for classes in (['a', 'b'], ['b', 'a'], ['c', 'a'], None):
        dataset = make(*files, classes=classes)
        expected = dict(zip(files, range(6)))  # tree() seeds a cloud by its position
        for i in range(len(dataset)):
            sample = dataset[i]
            assert dataset.metainfo['classes'][sample['label']] == sample['name'][0]
            cloud = points(expected[sample['name']])
            assert np.allclose(sorted(sample['points'].tolist()), sorted(cloud.tolist()))


def test_a_cache_in_use_survives_data_sets_of_other_settings(make):
    files = ['a/1.npy', 'a/1.txt', 'b/1.npy', 'b/2.npy', 'c/3.npy']
    options = ({}, dict(classes=['a', 'c']), dict(extensions=['.npy']), dict(extensions=['npy'], classes=['b', 'c']))
    make(*files)
    datasets = [make(**o) for o in options]
    sent = [pickle.dumps(dataset) for dataset in datasets]
    assert [len(pickle.loads(s)[0]['points']) for s in sent] == [30] * 4
    put(make.root / 'a/9.npy')  # the sources change: each data set replaces its own cache
    for o in options:
        make(**o)
    assert len([f for f in (make.root.parent / 'cache').iterdir() if f.is_dir()]) == 4


def test_nothing_in_a_class_folder_is_skipped(make):
    make('a/1.npy', 'b/1.npy')
    link = make.root / 'a/2.npy'
    link.symlink_to(make.root / 'nowhere.npy')
    with pytest.raises(ValueError, match=r'2\.npy: a link to nothing'):
        make()
    link.unlink()
    with pytest.raises(ValueError, match='more: a folder inside a class'):
        make('a/more/3.npy')
    with pytest.raises(ValueError, match='needs data_root'):
        FolderPointCloud(None)
