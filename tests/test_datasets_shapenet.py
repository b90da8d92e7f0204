"""ShapeNet-55: generated clouds behind lists, the official lists, hostile and incomplete ones."""
import numpy as np
import pytest

from ewa3d.datasets import ShapeNet55
from ewa3d.datasets.shapenet import SYNSETS

TRAIN = ['02691156-1a04e3eab45ca15dd86060f189eb133.npy', '03001627-udf068a6b-e65b-430b-bc17-611b062e2e34.npy',
         '02747177-.npy']
TEST = ['04554684-10d1a5f3a1d1d1.npy']
PACKED = [dict(type='Resample', num_points=32, method='random'), dict(type='Normalize'), dict(type='Pack')]


def cloud(name, n=64):
    rng = np.random.default_rng(sum(map(ord, name)))
    return rng.normal(loc=3, size=(n, 3)).astype(np.float32)


@pytest.fixture
def root(tmp_path):
    """The official layout with four shapes."""
    root = tmp_path / 'ShapeNet55-34'
    (root / 'shapenet_pc').mkdir(parents=True)
    for name in TRAIN + TEST:
        np.save(root / 'shapenet_pc' / name, cloud(name))
    write_lists(root / 'ShapeNet-55', train=TRAIN, test=TEST)
    return root


def write_lists(folder, **lists):
    folder.mkdir(exist_ok=True)
    for split, names in lists.items():
        (folder / f'{split}.txt').write_text('\n'.join(names) + '\n')


def test_there_are_55_classes_in_the_order_of_their_numbers():
    assert len(SYNSETS) == 55 == len(set(SYNSETS.values())) and list(SYNSETS) == sorted(SYNSETS)


def test_official_layout(root):
    dataset = ShapeNet55(root)
    assert len(dataset) == 3 and len(dataset.metainfo['classes']) == 55 and dataset.metainfo['up_axis'] == 'y'
    assert dataset.labels == [0, 18, 1]
    for i, name in enumerate(TRAIN):
        sample = dataset[i]
        assert np.array_equal(sample['points'], cloud(name)) and sample['name'] == name[:-4]
    assert ShapeNet55(root, split='test').labels == [54]


def test_whole_is_both_lists(root):
    dataset = ShapeNet55(root, whole=True)
    assert dataset.labels == [0, 18, 1, 54] and len({s['name'] for s in dataset}) == 4
    with pytest.raises(ValueError, match="'train', got 'test'"):
        ShapeNet55(root, split='test', whole=True)


def test_official_processing_is_a_pipeline(root):
    """A random subset first, then centre and unit sphere."""
    sample = ShapeNet55(root, pipeline=PACKED, seed=3)[0]
    points = sample['inputs']['points'].double()
    assert points.shape == (32, 3) and points.mean(0).abs().max() < 1e-6
    assert abs(points.norm(dim=1).max() - 1) < 1e-6 and int(sample['data_samples'].gt_label) == 0


def test_where_lists_and_clouds_may_be(root, tmp_path):
    lists = tmp_path / 'elsewhere'
    write_lists(lists, train=TRAIN[:1], test=TEST)
    assert len(ShapeNet55(root, list_dir=lists)) == 1
    assert len(ShapeNet55(root / 'shapenet_pc')) == 3  # the lists beside it
    (root / 'ShapeNet-55').rename(tmp_path / 'moved')
    with pytest.raises(FileNotFoundError, match=r'no list train\.txt.*ShapeNet-55.*list_dir'):
        ShapeNet55(root)
    write_lists(root, train=TRAIN[:2])
    assert len(ShapeNet55(root)) == 2
    with pytest.raises(FileNotFoundError, match=r'no list test\.txt'):
        ShapeNet55(root, split='test')
    with pytest.raises(FileNotFoundError, match='no folder'):
        ShapeNet55(tmp_path / 'no')
    with pytest.raises(FileNotFoundError, match=r'list_dir.*no folder'):
        ShapeNet55(root, list_dir=tmp_path / 'no')


def test_missing_clouds_are_counted(root):
    for name in TRAIN[1:]:
        (root / 'shapenet_pc' / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf'train\.txt lists 3 clouds, 2 of them.*first is .*{TRAIN[1]}'):
        ShapeNet55(root)
    assert len(ShapeNet55(root, split='test')) == 1


@pytest.mark.parametrize('text', ['\ufeff{}\n{}', '{}\r\n{}\r\n', '  {} \n\n\t{}\t\n \n', '{}\r{}'])
def test_lists_as_other_systems_write_them(root, text):
    (root / 'ShapeNet-55/train.txt').write_bytes(text.format(*TRAIN[:2]).encode())
    assert ShapeNet55(root).labels == [0, 18]


def test_a_list_that_names_a_cloud_twice(root):
    write_lists(root / 'ShapeNet-55', train=[*TRAIN, TRAIN[1]])
    with pytest.raises(ValueError, match=rf'train\.txt: 1 of its lines .* more than once, the first is .{TRAIN[1]}'):
        ShapeNet55(root)


def test_a_cloud_in_both_lists_is_found_by_whole(root):
    write_lists(root / 'ShapeNet-55', test=[*TEST, TRAIN[0]])
    with pytest.raises(ValueError, match=rf'1 of the clouds of train\.txt are in test\.txt as well.*{TRAIN[0][:-4]}'):
        ShapeNet55(root, whole=True)


@pytest.mark.parametrize('line', ['/etc/passwd', '../02691156-a.npy', '02691156-../../a.npy', '02691156-a/b.npy',
                                  r'02691156-a\b.npy', '02691156-a.npz', '02691156.npy', '٠٢٦٩١١٥٦-a.npy', 'chair_0001',
                                  '02691156-a\x00.npy', '0269115-a.npy', '\ufffd' * 400])
def test_hostile_lines_are_refused(root, line):
    write_lists(root / 'ShapeNet-55', train=[*TRAIN, line])
    with pytest.raises(ValueError, match=r'train\.txt: the line .* is no name of a cloud') as error:
        ShapeNet55(root)
    assert len(str(error.value)) < 1000


def test_lists_of_other_data(root):
    write_lists(root / 'ShapeNet-55', train=['00000001-a.npy'])
    with pytest.raises(ValueError, match='no class of ShapeNet-55'):
        ShapeNet55(root)
    write_lists(root / 'ShapeNet-55', train=[])
    with pytest.raises(ValueError, match='the list is empty'):
        ShapeNet55(root)
    (root / 'ShapeNet-55' / 'train.txt').write_bytes(b'\xff\xfe\x00binary')
    with pytest.raises(ValueError, match='no name of a cloud'):
        ShapeNet55(root)


def test_splits(root):
    with pytest.raises(ValueError, match="no split 'val'"):
        ShapeNet55(root, split='val')


@pytest.mark.parametrize(('content', 'match'), [
    (np.zeros((4, 2)), r'shape \(N, 3\+F\)'), (np.full((4, 3), np.nan), 'NaN'), (np.zeros((0, 3)), 'N > 0'),
    (np.array(['a']), 'array of numbers'), (np.array([{}], dtype=object), 'cannot be read')])
def test_bad_clouds_name_their_file(root, content, match):
    np.save(root / 'shapenet_pc' / TRAIN[0], content)
    with pytest.raises((ValueError, TypeError), match=match) as error:
        ShapeNet55(root)[0]
    assert TRAIN[0] in str(error.value)


def test_a_cut_off_cloud(root):
    file = root / 'shapenet_pc' / TRAIN[0]
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=f'{TRAIN[0]}.*cannot be read'):
        ShapeNet55(root)[0]


def test_official_lists(dataset_dir, tmp_path):
    """Every line is of a known class; without the clouds, they are missed by name."""
    lists = dataset_dir('shapenet55_official_splits')
    (tmp_path / 'shapenet_pc').mkdir()
    for split, size in (('train', 41_952), ('test', 10_518)):
        with pytest.raises(FileNotFoundError, match=f'lists {size} clouds, {size} of them'):
            ShapeNet55(tmp_path, split=split, list_dir=lists)
