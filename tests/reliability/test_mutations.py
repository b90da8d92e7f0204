"""Damaged and odd data: every reader gives a cloud or an error that names the file; transforms give finite numbers."""
import os
import random
from pathlib import Path

import h5py
import numpy as np
import pytest
from faults import need_open3d
from mutants import mutate, verdicts

from ewa3d.datasets import transforms as T
from ewa3d.datasets.folder import FolderPointCloud
from ewa3d.datasets.io import as_cloud, read_cloud

CLOUD = np.random.default_rng(0).normal(size=(12, 3)).round(3)
ROWS = [' '.join(map(str, row)) for row in CLOUD]
MUTANTS = 40  # of every format


def write_h5(path: Path) -> None:
    with h5py.File(path, 'w') as file:
        file['points'] = CLOUD


FORMATS = {
    'npy': lambda path: np.save(path, CLOUD), 'h5': write_h5,
    'npz': lambda path: np.savez_compressed(path, points=CLOUD),
    'txt': lambda path: path.write_text('\n'.join(ROWS)), 'csv': lambda path: path.write_text(
        'x,y,z\n' + '\n'.join(row.replace(' ', ',') for row in ROWS)),
    'xyz': lambda path: path.write_text(f'{len(ROWS)}\n' + '\n'.join(ROWS)),
    'off': lambda path: path.write_text('OFF\n12 2 0\n' + '\n'.join(ROWS) + '\n3 0 1 2\n4 3 4 5 6\n'),
    'obj': lambda path: path.write_text('\n'.join(f'v {row}' for row in ROWS) + '\nf 1 2 3\nf 4 5 6\n'),
    'ply': lambda path: path.write_bytes(b'ply\nformat binary_little_endian 1.0\nelement vertex 12\nproperty float x\n'
                                         b'property float y\nproperty float z\nend_header\n'
                                         + CLOUD.astype('<f4').tobytes()),
    'pcd': lambda path: path.write_bytes(
        b'VERSION 0.7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nCOUNT 1 1 1\nWIDTH 12\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\n'
        b'POINTS 12\nDATA binary\n' + CLOUD.astype('<f4').tobytes()),
    'stl': lambda path: path.write_bytes(bytes(80) + (2).to_bytes(4, 'little') + b''.join(
        np.concatenate([[0, 0, 1], CLOUD[i:i + 3].ravel()]).astype('<f4').tobytes() + b'\0\0' for i in (0, 3)))}
OPEN3D = ('ply', 'pcd', 'stl', 'obj')


def verdict(path: Path) -> str:
    """Nothing where a file is a proper cloud, or refused in the right way."""
    try:
        points, normals = read_cloud(path)
    except (ValueError, TypeError) as error:
        return '' if str(path) in str(error) else f'does not name the file: {error!r}'
    except Exception as error:
        return f'another error: {error!r}'
    fine = points.dtype == np.float32 and points.ndim == 2 and len(points) and np.isfinite(points).all()
    return '' if fine and normals in (True, False, None) else f'{points.dtype} {points.shape}'


@pytest.mark.parametrize('suffix', FORMATS)
def test_mutated_files(tmp_path, suffix):
    if suffix in OPEN3D:
        need_open3d()
    whole, rng = tmp_path / f'whole.{suffix}', random.Random(suffix)
    FORMATS[suffix](whole)
    assert not verdict(whole) and len(read_cloud(whole).points) >= 12
    mutants = [tmp_path / f'{i}.{suffix}' for i in range(MUTANTS)]
    for path in mutants:
        path.write_bytes(mutate(whole.read_bytes(), rng))
    found = verdicts(verdict, mutants)
    assert len(found) == MUTANTS, f'mutant {len(found)} ended the process: {mutants[len(found)].read_bytes()!r}'
    assert not [(number, text) for number, text in enumerate(found) if text]


@pytest.mark.parametrize('suffix', [s for s in FORMATS if s not in OPEN3D])
def test_odd_but_right(tmp_path, suffix):
    """Names with blanks and other letters; line ends and a mark of Windows in text."""
    plain, odd = tmp_path / f'a.{suffix}', tmp_path / 'päth mit ツ und leer' / f'b c.{suffix}'
    odd.parent.mkdir()
    FORMATS[suffix](plain)
    raw = plain.read_bytes()
    if suffix in ('txt', 'csv', 'xyz', 'off'):
        raw = b'\xef\xbb\xbf' + raw.replace(b'\n', b'\r\n')
    odd.write_bytes(raw)
    assert (read_cloud(plain).points == read_cloud(odd).points).all()


def test_links_that_go_in_circles(tmp_path):
    """Links to files are followed; one that leads to itself is named, one to a folder above is no file."""
    for name in 'ab':
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / '0.npy', CLOUD)
    os.symlink(tmp_path / 'a' / '0.npy', tmp_path / 'b' / '1.npy')
    assert len(FolderPointCloud(tmp_path, cache_dir=None)) == 3
    os.symlink(tmp_path / 'b' / 'loop.npy', tmp_path / 'b' / 'loop.npy')
    with pytest.raises(ValueError, match=r'loop\.npy: a link to nothing'):
        FolderPointCloud(tmp_path, cache_dir=None)
    (tmp_path / 'b' / 'loop.npy').unlink()
    os.symlink(tmp_path, tmp_path / 'b' / 'up')
    with pytest.raises(ValueError, match='up: a folder inside a class'):
        FolderPointCloud(tmp_path, cache_dir=None)


# ---- properties ------------------------------------------------------------------------------------------------------
PIPELINES = dict(
    normalize=lambda: [T.Normalize()], up=lambda: [T.UpAxis('y')], rotate=lambda: [T.Normalize(), T.RandomRotate()],
    fps=lambda: [T.Normalize(), T.Resample(4, pad='repeat')],
    train=lambda: [T.Resample(5, 'random', pad='repeat'), T.Normalize(), T.RandomScale(), T.RandomShift(),
                   T.RandomJitter(), T.RandomDrop()])
EDGES = dict(one=CLOUD[:1], equal=np.full((7, 3), 0.3), zero=np.zeros((7, 3)), huge=CLOUD * 1e30, tiny=CLOUD * 1e-38,
             far=CLOUD * 1e-3 + 5e6, line=CLOUD * [1, 0, 0], largest=np.sign(CLOUD) * 3e38)


def run(points: np.ndarray, pipeline) -> np.ndarray:
    results = dict(points=as_cloud(points, 'x'), rng=np.random.default_rng(0), up_axis='z', normals=False)
    for step in pipeline:
        results = step(results)
    return results['points']


@pytest.mark.parametrize('edge', EDGES)
@pytest.mark.parametrize('pipeline', PIPELINES)
def test_edge_cases_stay_finite(edge, pipeline):
    points = run(EDGES[edge], PIPELINES[pipeline]())
    assert points.dtype == np.float32 and np.isfinite(points).all()
    if pipeline == 'normalize':
        assert np.linalg.norm(points, axis=1).max() <= 1 + 1e-5


def test_any_array_is_a_cloud_or_an_error():
    hypothesis = pytest.importorskip('hypothesis')
    arrays = pytest.importorskip('hypothesis.extra.numpy')
    kinds = hypothesis.strategies.one_of(arrays.floating_dtypes(), arrays.integer_dtypes(), arrays.boolean_dtypes())
    any_array = arrays.arrays(kinds, arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=8))

    @hypothesis.settings(max_examples=150, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(any_array)
    def check(array):
        try:
            points = as_cloud(array, 'the name')
        except (ValueError, TypeError) as error:
            assert 'the name' in str(error)
            return
        assert points.dtype == np.float32 and points.shape == array.shape and np.isfinite(points).all()
        assert np.isfinite(run(points, PIPELINES['fps']())).all()

    with np.errstate(all='ignore'):
        check()


def test_any_table_is_read_as_it_was_written(tmp_path):
    hypothesis = pytest.importorskip('hypothesis')
    st = hypothesis.strategies
    number = st.floats(-1e6, 1e6, width=32)
    rows = st.lists(st.tuples(number, number, number), min_size=1, max_size=6)

    @hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(rows, st.sampled_from([' ', ',', '\t', ';', ', ']), st.sampled_from(['\n', '\r\n', '\n\n']),
                      st.sampled_from(['', '\ufeff']), st.sampled_from(['', '# a note\n', 'x y z\n']))
    def check(rows, mark, end, bom, head):
        head = head.replace(' ', mark) if head.startswith('x') else head
        path = tmp_path / 'x.txt'
        text = bom + head + end.join(mark.join(map(repr, row)) for row in rows)
        path.write_bytes(text.encode())
        expected = np.array(rows, np.float64)
        if np.abs((expected.max(0) + expected.min(0)) / 2).max() > 1000 * np.ptp(expected, axis=0).max():
            return  # moved to the origin, as it says
        assert (read_cloud(path).points == expected.astype(np.float32)).all()

    check()
