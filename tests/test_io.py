"""Readers: every format, and files that are broken or hostile."""
import os
import pickle
import sys

import h5py
import numpy as np
import pytest

from ewa3d.datasets.io import Mesh, as_cloud, import_open3d, read_cloud, read_h5, read_off, sample_mesh
from ewa3d.datasets.pickles import read_numpy_pickle

XYZ = np.arange(12, dtype=np.float64).reshape(4, 3) / 7
CUBE = """OFF
# a cube of side 2 with square faces
8 6 0
0 0 0
2 0 0
2 2 0
0 2 0
0 0 2
2 0 2
2 2 2
0 2 2
4 0 3 2 1
4 4 5 6 7 255 0 0
4 0 1 5 4
4 1 2 6 5
4 2 3 7 6
4 3 0 4 7
"""


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize('text', [
    '0 1 2\n3 4 5\n', '0,1,2\n3,4,5', '0;1;2\n3;4;5\n', 'x,y,z\n0,1,2\n3,4,5\n', '# note\n\n0\t1\t2 # first\n3 4 5\n',
    '2\nmolecule\n0 1 2\n3 4 5\n', '2\n0 1 2\n3 4 5\n', '\ufeff0 1 2\r\n3 4 5\r\n', '//X Y Z\n0.0 1e0 2.\n3 4 5'])
def test_text(tmp_path, text):
    path = tmp_path / 'a.txt'
    path.write_bytes(text.encode())
    assert np.array_equal(read_cloud(path).points, [[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize('text', [
    ',x,y,z\n7,0,1,2\n8,3,4,5', 'id,X,Y,Z\n7,0,1,2\n8,3,4,5', '"id";"z";"x";"y"\n7;2;0;1\n8;5;3;4',
    '//Z X Y\n2 0 1\n5 3 4',
    'Unnamed: 0,a,b,c\n7,0,1,2\n8,3,4,5', '"0","1","2"\n"3","4","5"', '0,1,2,\n3,4,5,', '0,0;1,0;2,0\n3,0;4;5',
    'index x y z\n7 0 1 2\n8 3 4 5', '# any three words\n0 1 2\n3 4 5', '2\nx y z\n0 1 2\n3 4 5'])
def test_text_headers_name_the_columns_and_marks_are_told_apart(tmp_path, text):
    assert np.array_equal(read_cloud(write(tmp_path / 'a.csv', text)).points, [[0, 1, 2], [3, 4, 5]])


def test_text_headers_tell_where_normals_are(tmp_path):
    cloud = read_cloud(write(tmp_path / 'a.csv', 'label,nx,ny,nz,x,y,z\n9,3,4,5,0,1,2\n8,3,4,5,1,1,2\n'))
    assert np.array_equal(cloud.points, [[0, 1, 2, 3, 4, 5, 9], [1, 1, 2, 3, 4, 5, 8]]) and cloud.normals is True
    assert read_cloud(write(tmp_path / 'b.csv', 'x,y,z,r,g,b\n0,1,2,3,4,5\n')).normals is False


@pytest.mark.parametrize('text, match', [
    ('1,2,3\n4,,6\n', 'empty|convert'), ('1,,3\n4,5,6\n', 'empty|convert'),
    ('3\nnote\n1 2 3\n4 5 6\n', '3 points ann.* 2 rows'),
    ('1\n1 2 3\n4 5 6\n', '1 points ann.* 2 rows'), ('2\nnote\nC 1 2 3\nC 4 5 6\n', 'no row'),
    ('0.5\n1 2 3\n4 5 6\n', '0.5 points'), ('0,5 1,5 2,5\n', 'no row'), ('x,y,z\n1,2,3,4\n5,6,7,8\n', '3 columns'),
    ('0,5;1;2\n3;4\n', 'column'), ("'1','2','3'\n", 'convert')])
def test_text_that_would_be_misread_is_an_error(tmp_path, text, match):
    with pytest.raises(ValueError, match=rf'bad.xyz.*({match})'):
        read_cloud(write(tmp_path / 'bad.xyz', text))


@pytest.mark.parametrize('name', ['a.txt', 'a.CSV', 'a.xyz'])
def test_text_keeps_further_columns(tmp_path, name):
    path = tmp_path / name
    np.savetxt(path, np.arange(12).reshape(2, 6), delimiter=',')
    cloud = read_cloud(path)
    assert cloud.points.shape == (2, 6) and cloud.points.dtype == np.float32 and cloud.normals is None


@pytest.mark.parametrize('text', ['', 'only words\n', '1 2\n3 4\n', '1 2 3\n4 5\n', '1 2 3\n4 five 6\n', '7\n'])
def test_broken_text_names_the_file(tmp_path, text):
    with pytest.raises(ValueError, match=r'bad.txt'):
        read_cloud(write(tmp_path / 'bad.txt', text))


@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
def test_coordinates_that_are_not_finite_name_file_and_point(tmp_path, value):
    with pytest.raises(ValueError, match=r'bad.txt: 1 of 2 points.*point 1'):
        read_cloud(write(tmp_path / 'bad.txt', f'1 2 3\n4 {value} 6\n'))


@pytest.mark.parametrize('dtype', [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_npy(tmp_path, dtype):
    points = np.arange(12).reshape(4, 3).astype(dtype)
    np.save(tmp_path / 'a.npy', points)
    cloud = read_cloud(tmp_path / 'a.npy').points
    assert cloud.dtype == np.float32 and np.array_equal(cloud, points)


@pytest.mark.parametrize('array, error', [
    (np.zeros((4, 2)), ValueError), (np.zeros((3, 100)), ValueError),
    (np.zeros(3), ValueError), (np.zeros((2, 4, 3)), ValueError),
    (np.zeros((0, 3)), ValueError), (np.array([[1e300] * 3, [-1e300] * 3]), ValueError),
    (np.zeros((2, 3), complex), TypeError),
    (np.array([['a', 'b', 'c']]), TypeError)])
def test_arrays_that_are_no_clouds(tmp_path, array, error):
    np.save(tmp_path / 'bad.npy', array)
    with pytest.raises(error, match=r'bad.npy'):
        read_cloud(tmp_path / 'bad.npy')


@pytest.mark.parametrize('keys, chosen', [(['points', 'data'], 'points'), (['label', 'data'], 'data'), (['foo'], 'foo'),
                                          (['color', 'xyz'], 'xyz'), (['arr_0', 'arr_1'], 'arr_0')])
def test_npz_and_h5_choose_the_array(tmp_path, keys, chosen):
    arrays = {key: XYZ if key == chosen else np.zeros(3) for key in keys}
    np.savez(tmp_path / 'a.npz', **arrays)
    np.testing.assert_allclose(read_cloud(tmp_path / 'a.npz').points, XYZ, rtol=1e-6)
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        file.update(arrays)
    np.testing.assert_allclose(read_cloud(tmp_path / 'a.h5').points, XYZ, rtol=1e-6)


def test_no_telling_which_array_is_an_error(tmp_path):
    np.savez(tmp_path / 'a.npz', one=XYZ, two=XYZ)
    with pytest.raises(ValueError, match=r"a.npz: .*\['one', 'two'\]"):
        read_cloud(tmp_path / 'a.npz')


@pytest.mark.parametrize('suffix', ['npy', 'npz', 'h5'])
def test_cut_off_files(tmp_path, suffix):
    path = tmp_path / f'cut.{suffix}'
    points = np.random.default_rng(0).normal(size=(500, 3))
    if suffix == 'h5':
        with h5py.File(path, 'w') as file:
            file['data'] = points
    else:
        (np.save if suffix == 'npy' else np.savez)(path, points)
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) // 2])
    with pytest.raises(ValueError, match=f'cut.{suffix}'):
        read_cloud(path)


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_pickled_npy_is_refused_and_nothing_runs(tmp_path):
    np.save(tmp_path / 'bad.npy', np.array([[Bomb(tmp_path / 'ran')] * 3], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r'bad.npy'):
        read_cloud(tmp_path / 'bad.npy')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('protocol', range(6))
def test_numpy_pickles_of_any_protocol(tmp_path, protocol):
    content = [[np.ones((5, 6), np.float32), XYZ, np.asfortranarray(XYZ)], [np.array([3], np.int32), np.int64(4), 5]]
    (tmp_path / 'a.dat').write_bytes(pickle.dumps(content, protocol))
    found = read_numpy_pickle(tmp_path / 'a.dat')
    for one, two in zip(found[0] + found[1], content[0] + content[1]):
        assert np.array_equal(one, two)


@pytest.mark.parametrize('core', [b'numpy.core', b'numpy._core'])
def test_numpy_pickles_of_either_major_version(tmp_path, core):
    raw = pickle.dumps([XYZ], 2)
    raw = raw.replace(b'numpy._core', core) if b'numpy._core' in raw else raw.replace(b'numpy.core', core)
    (tmp_path / 'a.dat').write_bytes(raw)
    assert np.array_equal(read_numpy_pickle(tmp_path / 'a.dat')[0], XYZ)


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('wrap', [lambda b: b, lambda b: [[b], [0]], lambda b: np.array([b], dtype=object)])
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, protocol, wrap):
    (tmp_path / 'bad.dat').write_bytes(pickle.dumps(wrap(Bomb(tmp_path / 'ran')), protocol))
    with pytest.raises(ValueError, match=r'bad.dat.*(mkdir|numbers were expected)'):
        read_numpy_pickle(tmp_path / 'bad.dat')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('raw', [
    b'', b'not a pickle', b'cos\nsystem\n(S"true"\ntR.', b'cbuiltins\neval\n(S"1"\ntR.',
    b'cnumpy\nload\n(S"x"\ntR.', b'cnumpy._core.multiarray\nfromfile\n.',
    b'c_codecs\nencode\n(Vx\nVrot13\ntR.', b'\x80\x04\x8c\x05numpy\x8c\x0bndarray.ctypes\x93.',
    pickle.dumps([XYZ])[:60]])
def test_other_names_and_broken_pickles_are_refused(tmp_path, raw):
    (tmp_path / 'bad.dat').write_bytes(raw)
    with pytest.raises(ValueError, match=r'bad.dat'):
        read_numpy_pickle(tmp_path / 'bad.dat')


@pytest.mark.parametrize('change', [
    lambda t: t, lambda t: t.replace('OFF\n# a cube of side 2 with square faces\n', 'OFF'),
    lambda t: t.replace('OFF\n', 'OFF '), lambda t: t.replace('8 6 0', '8 6'), lambda t: t.replace('\n', '\r\n'),
    lambda t: t.replace('2 2 2\n', '2 2 2  # corner\n\n'), lambda t: t.replace('OFF', 'COFF', 1),
    lambda t: '\ufeff' + t, lambda t: t.replace('OFF', 'off'),
    lambda t: t.replace('255 0 0', '').replace('2 0 0\n', '2 0\n0 '),
    lambda t: t.replace('4 4 5 6 7 255 0 0', '4 4 5 6 7').replace('2 2 0\n', '2\n2 0 ').replace('6 5\n', '6\n5\n')])
def test_off(tmp_path, change):
    text = change(CUBE)
    path = write(tmp_path / 'cube.off', text.replace('OFF # a cube', 'OFF # a'))
    mesh = read_off(path)
    assert mesh.vertices.shape == (8, 3) and mesh.faces.shape == (12, 3)
    edges = mesh.vertices[mesh.faces]
    area = np.linalg.norm(np.cross(edges[:, 1] - edges[:, 0], edges[:, 2] - edges[:, 0]), axis=1).sum() / 2
    assert area == pytest.approx(24)


def test_off_with_the_counts_run_into_the_header(tmp_path):
    assert len(read_off(write(tmp_path / 'a.off', 'OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n')).faces) == 1


@pytest.mark.parametrize('text', [
    '', 'PLY\n', 'OFF\n', 'OFF\nx y z\n', 'OFF\n8\n', 'OFF\n3 1 0\n0 0 0\n1 0 0\n',
    'OFF\n3 1 0\n0 0 0\n1 0 0\n0 1\n3 0 1 2\n',
    'OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1\n', 'OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n',
    'OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 -1\n', 'OFF\n3 1 0\n0 0 0\n1 1 1\n2 2 2\n3 0 1 2\n',
    'OFF\n3 1 0\n0 0 0\nnan 0 0\n0 1 0\n3 0 1 2\n', 'OFF\n0 0 0\n', 'OFF\n-3 -1 0\n'])
def test_broken_off_names_the_file(tmp_path, text):
    with pytest.raises(ValueError, match=r'bad.off'):
        read_cloud(write(tmp_path / 'bad.off', text))


def test_a_mesh_is_sampled_by_area_with_face_normals(tmp_path):
    # one triangle has three quarters of the area; normals are -z and +x
    vertices = np.array([[0, 0, 0], [0, 3, 0], [1, 0, 0], [5, 0, 0], [5, 1, 0], [5, 0, 1.]])
    mesh = Mesh(vertices, np.array([[0, 1, 2], [3, 4, 5]]))
    points = sample_mesh(mesh, 20_000, np.random.default_rng(0))
    first = points[:, 0] < 2
    assert first.mean() == pytest.approx(0.75, abs=0.01)
    np.testing.assert_allclose(points[first, 3:], np.tile([0, 0, -1.], (first.sum(), 1)), atol=1e-12)
    np.testing.assert_allclose(points[~first, 3:], np.tile([1., 0, 0], ((~first).sum(), 1)), atol=1e-12)
    np.testing.assert_allclose(points[first, :3].mean(0), [1 / 3, 1, 0], atol=0.02)  # evenly: the mean is the centroid
    assert (points[first, 0] + points[first, 1] / 3 <= 1 + 1e-9).all()
    same = sample_mesh(mesh, 20_000, np.random.default_rng(0))
    assert np.array_equal(points, same)


def test_off_without_faces_is_its_vertices(tmp_path):
    cloud = read_cloud(write(tmp_path / 'a.off', 'OFF\n2 0 0\n0 0 0\n1 2 3\n'))
    assert np.array_equal(cloud.points, [[0, 0, 0], [1, 2, 3]]) and cloud.normals is False


def test_obj_without_faces_is_its_vertices(tmp_path, open3d):
    cloud = read_cloud(write(tmp_path / 'a.obj', '# note\nv 0 0 0\nv 1 2 3 1.0\nvn 0 0 1\n'))
    assert np.array_equal(cloud.points, [[0, 0, 0], [1, 2, 3]]) and cloud.normals is False


def test_real_off_samples(dataset_dir):
    for path in sorted(dataset_dir('modelnet10_off_samples').rglob('*.off')):
        mesh = read_off(path)
        points = sample_mesh(mesh, 2000, np.random.default_rng(0))
        assert (points[:, :3] >= mesh.vertices.min(0) - 1e-6).all()
        assert (points[:, :3] <= mesh.vertices.max(0) + 1e-6).all()


def test_a_cloud_far_away_keeps_its_shape():
    points = np.random.default_rng(0).normal(size=(100, 3)) + [5e5, 5e6, 100]
    cloud = as_cloud(points, 'map')
    np.testing.assert_allclose(cloud - cloud[0], points - points[0], atol=1e-5)
    near = np.random.default_rng(0).normal(size=(100, 3)) + 10
    assert np.array_equal(as_cloud(near, 'near'), near.astype(np.float32))


def test_unknown_extension_and_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"a\.las: unknown extension '\.las'.*\.npy"):
        read_cloud(write(tmp_path / 'a.las', ''))
    with pytest.raises(FileNotFoundError, match=r'no.npy'):
        read_cloud(tmp_path / 'no.npy')


def test_read_h5_says_which_key_is_missing(tmp_path):
    with h5py.File(tmp_path / 'a.h5', 'w') as file:
        file['data'] = XYZ
    with pytest.raises(ValueError, match=r"a.h5: has no key 'label', only \['data'\]"):
        read_h5(tmp_path / 'a.h5', 'data', 'label')


@pytest.mark.parametrize('name', ['a.ply', 'a.pcd', 'a.obj', 'a.stl'])
def test_without_open3d_the_error_says_what_to_install(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, 'open3d', None)
    path = write(tmp_path / name, 'ply\nend_header\n')
    with pytest.raises(ImportError, match=r"pip install 'ewa3d\[3d\]'") as error:
        read_cloud(path)
    assert name in str(error.value)


@pytest.fixture(scope='module')
def open3d():
    pytest.importorskip('libusb_package')
    try:
        return import_open3d()
    except ImportError as error:
        pytest.skip(f'open3d: {error}')


def test_open3d_clouds(tmp_path, open3d):
    for suffix in ('ply', 'pcd'):
        cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(XYZ))
        open3d.io.write_point_cloud(str(tmp_path / f'a.{suffix}'), cloud)
        found = read_cloud(tmp_path / f'a.{suffix}')
        np.testing.assert_allclose(found.points, XYZ, rtol=1e-6)
        assert found.normals is False
        cloud.normals = open3d.utility.Vector3dVector(np.tile([0, 0, 1.], (4, 1)))
        open3d.io.write_point_cloud(str(tmp_path / f'b.{suffix}'), cloud)
        found = read_cloud(tmp_path / f'b.{suffix}')
        assert found.points.shape == (4, 6) and found.normals is True


def test_open3d_meshes(tmp_path, open3d):
    mesh = open3d.geometry.TriangleMesh.create_box(1, 2, 3)
    mesh.compute_triangle_normals()
    for suffix in ('ply', 'obj', 'stl', 'off'):
        open3d.io.write_triangle_mesh(str(tmp_path / f'a.{suffix}'), mesh)
        cloud = read_cloud(tmp_path / f'a.{suffix}', 3000)
        assert cloud.points.shape == (3000, 6) and cloud.normals is True
        np.testing.assert_allclose(cloud.points[:, :3].mean(0), [0.5, 1, 1.5], atol=0.06)
        np.testing.assert_allclose(cloud.points[:, :3].max(0), [1, 2, 3], atol=1e-5)


@pytest.mark.parametrize('name', ['bad.ply', 'bad.pcd', 'bad.obj', 'bad.stl'])
def test_open3d_broken_files_name_the_file(tmp_path, open3d, name):
    with pytest.raises(ValueError, match=name):
        read_cloud(write(tmp_path / name, 'nothing of the kind\n'))


def test_real_pcd_samples(dataset_dir, open3d):
    files = sorted(dataset_dir('modelnet10_pcd_samples').rglob('*.pcd'))
    assert len(files) == 20
    for path in files:
        assert read_cloud(path).points.shape == (1024, 3)


@pytest.mark.parametrize('ascii_', [True, False])
@pytest.mark.parametrize('suffix', ['ply', 'pcd', 'compressed.pcd'])
def test_cut_off_clouds_say_how_much_was_announced_and_found(tmp_path, open3d, suffix, ascii_):
    points = np.random.default_rng(0).normal(size=(100, 3))
    path = tmp_path / f'cut.{suffix}'
    open3d.io.write_point_cloud(str(path), open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points)),
                                write_ascii=ascii_, compressed='compressed' in suffix)
    raw = path.read_bytes()
    assert read_cloud(path).points.shape == (100, 3)
    path.write_bytes(raw[:-200 if ascii_ else -50])
    with pytest.raises(ValueError, match=rf'cut.{suffix}: 100 (points|vertices).* announced, \d+ .*found'):
        read_cloud(path)


@pytest.mark.parametrize('order', ['ascii', 'binary_little_endian', 'binary_big_endian'])
def test_ply_by_hand(tmp_path, open3d, order):
    header = (f'ply\nformat {order} 1.0\ncomment by hand\nelement vertex 4\nproperty float x\nproperty float y\n'
              'property float z\nelement face 2\nproperty list uchar int vertex_indices\nend_header\n').encode()
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]])
    if order == 'ascii':
        body = b'0 0 0\n1 0 0\n1 1 0\n0 1 0\n3 0 1 2\n3 0 2 3\n'
    else:
        e = '<' if 'little' in order else '>'
        body = corners.astype(e + 'f4').tobytes() + b''.join(
            b'\x03' + np.array(face, e + 'i4').tobytes() for face in ([0, 1, 2], [0, 2, 3]))
    path = tmp_path / 'a.ply'
    path.write_bytes(header + body)
    assert read_cloud(path, 50).points.shape == (50, 6)
    path.write_bytes(header + body[:-5])
    with pytest.raises(ValueError, match=r'a.ply: 2 faces announced, 1 found'):
        read_cloud(path)
    path.write_bytes(header + body[:20])
    with pytest.raises(ValueError, match=r'a.ply: 4 vertices announced, \d found'):
        read_cloud(path)


@pytest.mark.parametrize('old, new', [('format ascii', 'format text'), ('float x', 'number x'),
                                      ('vertex 1', 'vertex many'), ('end_header', 'end')])
def test_broken_ply_headers_name_the_file(tmp_path, open3d, old, new):
    text = 'ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\nend_header\n'
    with pytest.raises(ValueError, match=r'bad.ply'):
        read_cloud(write(tmp_path / 'bad.ply', (text + '1 2 3\n').replace(old, new)))


def test_large_integers_keep_their_shape():
    """Coordinates in millimetres of a map: rounded to single precision only after they were moved."""
    rows = np.array([[4_500_000_000, 10, 0], [4_500_000_001, 12, 0], [4_500_000_003, 10, 5]])
    assert np.ptp(as_cloud(rows, 'x'), axis=0).tolist() == [3, 2, 5]
    assert as_cloud(np.array([[1.7e308, 0, 0], [1.7e308, 1, 1]]), 'x').tolist() == [[0, -0.5, -0.5], [0, 0.5, 0.5]]
    with np.errstate(over='ignore'), pytest.raises(ValueError, match='do not fit float32'):
        as_cloud(np.array([[1.7e308, 0, 0], [-1.7e308, 1, 1]]), 'x')
