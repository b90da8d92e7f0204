"""ScanObjectNN: generated files of each variant, the background, bad files, and real clouds in its layout."""
import h5py
import numpy as np
import pytest

from ewa3d.datasets import ScanObjectNN

FILES = {('objbg', 'train'): 'main_split/training_objectdataset.h5',
         ('objbg', 'test'): 'main_split/test_objectdataset.h5',
         ('objonly', 'train'): 'main_split_nobg/training_objectdataset.h5',
         ('objonly', 'test'): 'main_split_nobg/test_objectdataset.h5',
         ('hardest', 'train'): 'main_split/training_objectdataset_augmentedrot_scale75.h5',
         ('hardest', 'test'): 'main_split/test_objectdataset_augmentedrot_scale75.h5'}
TRAIN = FILES['hardest', 'train']


def arrays(seed, n=3, points=40):
    rng = np.random.default_rng(seed)
    data = rng.normal(loc=2, size=(n, points, 3)).astype(np.float32)
    return dict(data=data, label=np.array([14, 0, 7], np.int32)[:n],
                mask=np.where(rng.random((n, points)) < 0.3, -1, rng.integers(0, 4, (n, points))).astype(np.int32))


def write(path, **content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, 'w') as file:
        for key, value in content.items():
            if value is not None:
                file[key] = value


@pytest.fixture
def root(tmp_path):
    """All six files."""
    for seed, name in enumerate(FILES.values()):
        write(tmp_path / 'ScanObjectNN' / name, **arrays(seed))
    return tmp_path / 'ScanObjectNN'


def make(root, **kwargs):
    return ScanObjectNN(root, **{'cache_dir': None, **kwargs})


def rows(points, *columns):
    """The rows as a sorted list: clouds come in another order than they are stored in."""
    return sorted(np.column_stack([points, *columns]).tolist())


@pytest.mark.parametrize(('variant', 'split'), FILES)
def test_variants_read_their_files(root, variant, split):
    dataset = make(root, variant=variant, split=split)
    source = arrays(list(FILES).index((variant, split)))
    assert dataset.labels == [14, 0, 7] and dataset.metainfo['up_axis'] == 'y'
    assert len(dataset.metainfo['classes']) == 15 and dataset.metainfo['classes'][14] == 'toilet'
    for i in range(3):
        sample = dataset[i]
        assert rows(sample['points'], sample['parts']) == rows(source['data'][i], source['mask'][i] != -1)
        assert np.array_equal(sample['points'][0], source['data'][i, 0]) and sample['fps_ordered']  # not normalised
    assert dataset[1]['name'] == f'{FILES[variant, split].rpartition("/")[2]}[1]'


def test_hardest_and_train_are_the_defaults(root):
    assert np.array_equal(make(root)[0]['points'], make(root, variant='hardest', split='train')[0]['points'])


def test_files_below_h5_files(root):
    (root / 'h5_files').mkdir()
    for name in ('main_split', 'main_split_nobg'):
        (root / name).rename(root / 'h5_files' / name)
    assert len(make(root)) == len(make(root / 'h5_files')) == 3


def test_the_cache_gives_the_same_and_maps_the_file(root, tmp_path):
    for background in ('mark', 'drop'):
        fresh = make(root, background=background)
        for _ in range(2):
            cached = make(root, background=background, cache_dir=tmp_path / 'cache')
            for a, b in zip(fresh, cached):
                assert np.array_equal(a['points'], b['points'])
                assert ('parts' in a) == ('parts' in b) and np.array_equal(a.get('parts', 0), b.get('parts', 0))
    assert len(list((tmp_path / 'cache').glob('scanobjectnn_hardest_train-*'))) == 4  # two caches, their locks


def test_background_can_be_dropped(root):
    dataset, source = make(root, background='drop'), arrays(4)
    for i, sample in enumerate(dataset):
        assert rows(sample['points']) == rows(source['data'][i][source['mask'][i] != -1]) and 'parts' not in sample
    assert len({len(sample['points']) for sample in dataset}) > 1
    packed = make(root, background='drop', pipeline=[dict(type='Resample', num_points=40, pad='repeat'),
                                                     dict(type='Pack')])
    assert packed[0]['inputs']['points'].shape == (40, 3)


def test_parts_follow_the_points_through_a_pipeline(root):
    dataset = make(root, pipeline=[dict(type='Resample', num_points=30, method='random'), dict(type='Pack')])
    source = arrays(4)
    object_points = {tuple(p) for p in source['data'][0][source['mask'][0] != -1].tolist()}
    sample = dataset[0]
    marked = [tuple(p) in object_points for p in sample['inputs']['points'].tolist()]
    assert marked == sample['data_samples'].gt_parts.bool().tolist() and 0 < sum(marked) < 30


def test_a_file_without_a_mask(root):
    write(root / TRAIN, **{**arrays(4), 'mask': None})
    assert 'parts' not in make(root)[0]
    with pytest.raises(ValueError, match=r"scale75\.h5: has no key 'mask', which background='drop' needs"):
        make(root, background='drop')


@pytest.mark.parametrize(('change', 'match'), [
    (dict(data=None), "no key 'data'"), (dict(label=None), "no key 'label'"),
    (dict(label=np.array([0, 15, 1])), 'label 15 of shape 1'), (dict(label=np.array([0, -1, 1])), 'label -1'),
    (dict(label=np.array([0.5, 1, 1])), 'one integer'), (dict(label=np.zeros((3, 2), int)), 'one integer'),
    (dict(label=np.int32(3)), 'one integer'), (dict(label=np.array([1, 2])), r"'data' should have the shape \(2, "),
    (dict(data=np.zeros((3, 40))), "'data' should have"), (dict(data=np.zeros((3, 40, 2))), "'data' should have"),
    (dict(data=np.full((3, 40, 3), np.nan)), r'\[0\].*NaN'),
    (dict(data=np.zeros((3, 0, 3)), mask=None), r'\[0\].*N > 0'),
    (dict(data=np.full((3, 40, 3), b'a')), 'array of numbers'),
    (dict(mask=np.zeros((3, 41))), "'mask' has the shape"), (dict(mask=np.zeros((3, 40, 2))), 'one number a point'),
    (dict(mask=np.zeros(3)), "'mask' has the shape"), (dict(mask=np.full((3, 40), b'a')), 'one number a point'),
    (dict(label=np.zeros(0, int), data=np.zeros((0, 40, 3)), mask=np.zeros((0, 40))), 'holds no clouds')])
def test_bad_content(root, change, match):
    write(root / TRAIN, **{**arrays(4), **change})
    with pytest.raises((ValueError, TypeError), match=match) as error:
        make(root)
    assert 'training_objectdataset_augmentedrot_scale75.h5' in str(error.value)


def test_a_group_is_no_array(root):
    write(root / TRAIN, **{**arrays(4), 'data': None, 'data/x': np.zeros(3)})
    with pytest.raises(ValueError, match="'data' is a group"):
        make(root)


def test_what_cannot_be_read_names_the_file(root):
    """A link to nothing, an array without content, one that no memory holds."""
    write(root / TRAIN, **{**arrays(4), 'data': h5py.SoftLink('/nowhere')})
    with pytest.raises(ValueError, match=r"scale75\.h5: 'data' is a link"):
        make(root)
    write(root / TRAIN, **{**arrays(4), 'data': h5py.Empty('f4')})
    with pytest.raises(ValueError, match=r"scale75\.h5: 'data' is a group or holds nothing"):
        make(root)
    write(root / TRAIN, **{**arrays(4), 'data': None})
    with h5py.File(root / TRAIN, 'a') as file:
        file.create_dataset('data', (3, 10**15, 3), 'f4', chunks=(1, 1024, 3))
    with pytest.raises(ValueError, match=r'scale75\.h5: (cannot be read|0 bytes that unpack to)'):
        make(root)


def test_nothing_but_background(root):
    write(root / TRAIN, **{**arrays(4), 'mask': np.full((3, 40), -1)})
    assert not make(root)[0]['parts'].any()
    with pytest.raises(ValueError, match=r'scale75\.h5\[0\]: all points are background'):
        make(root, background='drop')


def test_a_cut_off_file(root):
    whole = (root / TRAIN).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 100):
        (root / TRAIN).write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r'training_objectdataset_augmentedrot_scale75\.h5.*cut off'):
            make(root)


def test_missing_files(root, tmp_path):
    (root / TRAIN).unlink()
    with pytest.raises(FileNotFoundError, match=r"'hardest'.*main_split/training_objectdataset_augmentedrot_scale75"):
        make(root)
    with pytest.raises(FileNotFoundError, match='no folder'):
        make(tmp_path / 'no')


@pytest.mark.parametrize(('options', 'match'), [(dict(variant='pb_t50_rs'), 'no variant'), (dict(split='val'), 'split'),
                                                (dict(background='keep'), "'mark' or 'drop', got 'keep'")])
def test_bad_options(root, options, match):
    with pytest.raises(ValueError, match=match):
        make(root, **options)


@pytest.mark.parametrize('variant', ['objbg', 'objonly'])
def test_real_scans(dataset_dir, tmp_path, variant):
    """Objects of 23 ScanNet scans in the layout of ScanObjectNN."""
    root = dataset_dir('scanobjects_from_scannet')
    for split, size in (('train', 187), ('test', 87)):
        dataset = ScanObjectNN(root, variant, split, metainfo=dict(up_axis='z'), cache_dir=tmp_path, pipeline=[
            dict(type='Resample', num_points=1024, pool=1200, method='random'), dict(type='Pack')])
        assert len(dataset) == size and len(set(dataset.labels)) == 12 and dataset.metainfo['up_axis'] == 'z'
        sample = dataset[size - 1]
        assert sample['inputs']['points'].shape == (1024, 3)
        parts = sample['data_samples'].gt_parts
        assert parts.all() == (variant == 'objonly') and parts.any()
