"""FolderParts: parts in the last column or beside the cloud, and folders that are wrong."""
import json

import numpy as np
import pytest

from ewa3d.datasets import FolderParts
from ewa3d.datasets.folder_parts import read_parts

PARTS = dict(mug=['body', 'handle'], chair=['seat', 'back', 'leg'])


def cloud(seed: int, parts: int, n: int = 40, columns: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, columns)).astype(np.float32), rng.integers(parts, size=n)


@pytest.fixture
def root(tmp_path):
    """Two categories in two splits; chairs have their parts in a column, mugs beside."""
    root = tmp_path / 'mine'
    for i, split in enumerate(('train', 'test')):
        for name, parts in PARTS.items():
            (root / split / name).mkdir(parents=True)
            points, labels = cloud(10 * i, len(parts))
            if name == 'chair':
                np.savetxt(root / split / name / 'a.txt', np.column_stack([points, labels]))
            else:
                np.save(root / split / name / 'a.npy', points)
                np.savetxt(root / split / name / 'a.seg', labels, fmt='%d')
    (root / 'parts.json').write_text(json.dumps(PARTS))
    return root


def test_parts_are_counted_through_all_categories(root, tmp_path):
    for cache in (tmp_path / 'cache', None):
        data = FolderParts(root, 'train', cache_dir=cache)
        assert data.metainfo['classes'] == ('chair', 'mug') and data.labels == [0, 1]
        assert data.metainfo['parts'] == dict(chair=(0, 1, 2), mug=(3, 4))
        assert data.metainfo['part_names'] == ('chair/seat', 'chair/back', 'chair/leg', 'mug/body', 'mug/handle')
        for i, (name, first) in enumerate((('chair', 0), ('mug', 3))):
            points, labels = cloud(0, len(PARTS[name]))
            found, order = data[i], np.argsort(data[i]['points'][:, 0])
            np.testing.assert_allclose(found['points'][order], points[np.argsort(points[:, 0])], rtol=1e-6)
            np.testing.assert_array_equal(found['parts'][order], first + labels[np.argsort(points[:, 0])])


def test_parts_given_and_one_category(root):
    data = FolderParts(root, None, classes=['mug'], parts=dict(mug=('a', 'b')), cache_dir=None)
    assert len(data) == 2 and data.metainfo['part_names'] == ('mug/a', 'mug/b') and data[0]['parts'].max() == 1


def test_a_column_between(root):
    points, labels = cloud(3, 2, columns=4)
    for split in ('train', 'test'):
        np.save(root / split / 'mug' / 'a.npy', points)
        np.savetxt(root / split / 'mug' / 'a.seg', labels, fmt='%d')
    assert FolderParts(root, classes=['mug'], num_features=1, cache_dir=None)[0]['points'].shape == (40, 4)
    with pytest.raises(ValueError, match='5 columns are wanted'):
        FolderParts(root, classes=['mug'], num_features=2, cache_dir=None)[0]


def test_other_parts_make_another_cache(root, tmp_path):
    assert FolderParts(root, cache_dir=tmp_path / 'cache')[1]['parts'].min() == 3
    (root / 'parts.json').write_text(json.dumps(dict(PARTS, chair=['a', 'b', 'c', 'd'])))
    assert FolderParts(root, cache_dir=tmp_path / 'cache')[1]['parts'].min() == 4
    (root / 'train' / 'mug' / 'a.seg').write_text('1\n' * 40)
    assert set(FolderParts(root, cache_dir=tmp_path / 'cache')[1]['parts']) == {5}


def test_what_cannot_be_read_is_skipped(root):
    (root / 'train' / 'mug' / 'b.npy').write_bytes(b'no array')
    data = FolderParts(root, on_error='skip', cache_dir=None)
    assert len(data) == 2 and len(data.skipped) == 1


@pytest.mark.parametrize('file, text, error, what', [
    ('train/mug/a.seg', '0\n' * 39, ValueError, '39 parts for the 40 points of a.npy'),
    ('train/mug/a.seg', '0\n' * 39 + '2\n', ValueError, "point 39 has the part 2; 'mug' has the parts 0 to 1"),
    ('train/mug/a.seg', '0\n' * 39 + '-1\n', ValueError, 'point 39 has the part -1'),
    ('train/mug/a.seg', '0\n' * 39 + '0.5\n', ValueError, 'should be an integer'),
    ('train/mug/a.seg', 'body\n' * 40, ValueError, 'a number a row was expected'),
    ('train/chair/a.txt', '0 0 0\n1 1 1\n', ValueError, 'has no column with the parts'),
    ('parts.json', '{', ValueError, 'is no JSON'),
    ('parts.json', '[]', ValueError, 'category → list of names'),
    ('parts.json', '{"mug": "body", "chair": ["a"]}', ValueError, "parts of 'mug' should be a list"),
    ('parts.json', '{"mug": ["a", "a"], "chair": ["a"]}', ValueError, 'different names'),
    ('parts.json', '{"mugs": ["a"], "chair": ["a", "b", "c"]}', KeyError, "'mug' has no parts in parts.json; did you"),
])
def test_errors_name_the_file(root, file, text, error, what):
    (root / file).write_text(text)
    with pytest.raises(error, match='mine') as raised:
        len(FolderParts(root, cache_dir=None))
    assert what in str(raised.value)


def test_no_names(root, tmp_path):
    (root / 'parts.json').unlink()
    with pytest.raises(FileNotFoundError, match='it names the parts of each category'):
        FolderParts(root)
    assert read_parts(tmp_path / 'x.json', dict(a=['b'])) == dict(a=('b',))
