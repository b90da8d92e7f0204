"""More files that were made to harm: those that lead a library elsewhere, or past a check of ours."""
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from faults import need_open3d
from test_hostile import BOX, Runs, check_refused, npy_header, pcd, ply, saved, secret

from ewa3d.cli.options import load_config
from ewa3d.datasets.io import read_cloud
from ewa3d.datasets.pickles import read_numpy_pickle
from ewa3d.engine.checkpoint import read_checkpoint

TRAPS: dict = {}  # name → (file name, reader, function that gives the content or writes the file)
TRIANGLE = b'v 0 0 0\nv 1 0 0\nv 0 1 0\n'
CLOUD = pcd('binary', np.arange(12, dtype='<f4').tobytes(), 4)


def trap(name: str, reader=read_cloud):
    def add(make):
        TRAPS[make.__name__] = name, reader, make
        return make
    return add


# ---- pickles --------------------------------------------------------------------------------------------------------
TWICE = b'(K\x01t' + b'2\x86' * 60  # a tuple that holds the one before twice, sixty times


@trap('x.pkl', read_numpy_pickle)
def pickle_that_announces_bytes(folder):
    return b'\x80\x05\x96' + struct.pack('<Q', 3 * 2 ** 30) + b'.'


@trap('x.pkl', read_numpy_pickle)
def pickle_of_tuples_that_hold_one_another(folder):
    return b'\x80\x02' + TWICE + b'.'


for _name, _begin, _end in (('an_item', b'}', b'K\x01s'), ('items', b'}(', b'K\x01u'), ('a_dict', b'(', b'K\x01d'),
                            ('a_set', b'\x8f(', b'\x90'), ('a_frozenset', b'(', b'\x91')):
    TRAPS[f'pickle_that_hashes_{_name}'] = 'x.pkl', read_numpy_pickle, lambda folder, begin=_begin, end=_end: (
        b'\x80\x04' + begin + TWICE + end + b'.')


def checkpoint_of(content: bytes, folder: Path) -> None:
    with zipfile.ZipFile(folder / 'x.pth', 'w') as archive:
        for name, data in (('data.pkl', content), ('version', b'3'), ('byteorder', b'little')):
            archive.writestr(f'x/{name}', data)


CHAIN = b'(K\x01tq\x01' + b''.join(b'h%ch%c\x86q%c' % (i, i, i + 1) for i in range(1, 60))  # the same without copies


@trap('x.pth', read_checkpoint)
def checkpoint_that_hashes(folder):
    checkpoint_of(b'\x80\x02}q\x00' + CHAIN + b'h\x00h\x3cK\x01s.', folder)


@trap('x.pth', read_checkpoint)
def old_checkpoint_that_hashes(folder):
    whole = saved(dict(state_dict={}), _use_new_zipfile_serialization=False)
    return whole.replace(b'}q\x00', b'}q\x00' + CHAIN + b'h\x00h\x3cK\x01s', 2)


@trap('x.pth', read_checkpoint)
def checkpoint_of_much_memory(folder):
    return saved(dict(state_dict={}, meta=dict(a=Runs(bytearray, (3 * 10 ** 9,)))))


@trap('x.pth', read_checkpoint)
def checkpoint_of_a_large_array(folder):
    return saved(dict(state_dict={}, meta=dict(a=Runs(np.ndarray, ((10 ** 9,),)))))


@trap('x.pth', read_checkpoint)
def checkpoint_of_a_large_array_of_objects(folder):
    made = Runs(np._core.multiarray._reconstruct, (np.ndarray, (10 ** 8,), b'O'))
    return saved(dict(state_dict={}, meta=dict(a=made)))


@trap('x.pth', read_checkpoint)
def checkpoint_of_a_pointer(folder):
    return saved(dict(state_dict={}, meta=dict(a=Runs(
        np._core.multiarray.scalar, (Runs(np.dtype, ([('a', 'O')],)), b'AAAAAAAA')))))


# ---- archives, h5 ---------------------------------------------------------------------------------------------------
@trap('x.npz')
def archive_that_lies_about_what_it_takes(folder):
    with zipfile.ZipFile(folder / 'x.npz', 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as archive, \
            archive.open('points.npy', 'w', force_zip64=True) as file:
        file.write(npy_header((14 * 10 ** 6, 3)))
        for _ in range(42):
            file.write(bytes(8 * 10 ** 6))
    raw = bytearray((folder / 'x.npz').read_bytes())
    struct.pack_into('<I', raw, raw.rfind(b'PK\1\2') + 20, 3 * 10 ** 8)
    return bytes(raw)


@trap('x.h5')
def h5_link_to_a_link_to_a_file(folder):
    with h5py.File(folder / 'x.h5', 'w') as file:
        file['other'] = h5py.ExternalLink(secret(folder), '/points')
        file['points'] = h5py.SoftLink('/other')


@trap('x.h5')
def h5_link_that_waits(folder):
    os.mkfifo(folder / 'pipe')
    with h5py.File(folder / 'x.h5', 'w') as file:
        file['other'] = h5py.ExternalLink(str(folder / 'pipe'), '/points')
        file['points'] = h5py.SoftLink('/other')


@trap('x.h5')
def h5_chunk_that_is_larger_than_the_array(folder):
    packer = zlib.compressobj(1)
    chunk = b''.join([packer.compress(bytes(8 * 10 ** 6)) for _ in range(42)] + [packer.flush()])
    with h5py.File(folder / 'x.h5', 'w') as file:
        data = file.create_dataset('points', (10, 3), 'f8', chunks=(14 * 10 ** 6, 3), maxshape=(None, 3),
                                   compression='gzip')
        data.id.write_direct_chunk((0, 0), chunk)


@trap('x.h5')
def h5_lists(folder):
    with h5py.File(folder / 'x.h5', 'w') as file:
        file.create_dataset('points', (4, 3), h5py.vlen_dtype('f8'))


# ---- meshes and clouds ----------------------------------------------------------------------------------------------
@trap('x.pcd')
def pcd_with_another_word_for_points(folder):
    return CLOUD.replace(b'DATA', b'POINTSX 300000000\nDATA')


@trap('x.pcd')
def pcd_with_a_number_behind_a_long_line(folder):
    return b'#' + b' ' * 1022 + b'POINTS 300000000\n' + CLOUD


@trap('x.pcd')
def pcd_whose_data_begin_earlier(folder):
    return pcd('binary', bytes(8) + b'\nDATA ascii\n1 1 1\n', 10 ** 8).replace(b'DATA b', b' DATA b')


for _old, _new in (('TYPE F F F', 'TYPE Q Q Q'), ('SIZE 4 4 4', 'SIZE 1 1 1'), ('FIELDS x y z', 'FIELDS x y'),
                   ('COUNT 1 1 1', 'COUNT 1 1 2')):
    TRAPS[f'pcd_of_{_new.replace(" ", "_")}'] = 'x.pcd', read_cloud, lambda folder, old=_old, new=_new: (
        CLOUD.replace(old.encode(), new.encode()) + bytes(100))


@trap('x.pcd')
def pcd_of_words(folder):
    return pcd('ascii', b'0 0 0\na b c\n2 2 2\n', 3)


@trap('x.ply')
def ply_whose_coordinates_are_lists(folder):
    return ply('ascii', BOX.replace('float x', 'list uchar float x'), b'1 0 0 0\n' * 3, 3)


@trap('x.ply')
def ply_with_a_list_of_many_corners(folder):
    return ply('binary_little_endian', BOX, bytes(36) + b'\xff' * 4 + bytes(100), 3,
               'element face 1\nproperty list uint int vertex_indices\n')


@trap('x.off')
def off_with_a_face_below_zero(folder):
    return b'OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n-3 0 1 2\n'


for _row in ('0.1 0.2 0.x3', '1j 2 3', '0.1 0.2 abc'):
    TRAPS[f'text_that_begins_with_{_row}'] = 'x.txt', read_cloud, lambda folder, row=_row: f'{row}\n1 2 3\n'.encode()


# ---- configs that are data -------------------------------------------------------------------------------------------
@trap('x.yaml', load_config)
def yaml_of_a_billion_laughs(folder):
    rows = ['a0: &a0 [ha, ha]'] + [f'a{i}: &a{i} [{", ".join([f"*a{i - 1}"] * 10)}]' for i in range(1, 12)]
    return '\n'.join(rows).encode()


@trap('x.yml', load_config)
def yaml_that_holds_itself(folder):
    return b'a: &a [*a]\n'


@trap('x.yaml', load_config)
def yaml_that_runs(folder):
    return f'a: !!python/object/apply:os.mkdir ["{folder}/it-ran"]\n'.encode()


@trap('x.yaml', load_config)
def yaml_on_yaml_that_runs(folder):
    (folder / 'y.yml').write_bytes(yaml_that_runs(folder))
    return b'_base_: y.yml\n'


@trap('x.yaml', load_config)
def yaml_on_itself(folder):
    return b'_base_: x.yaml\n'


@trap('x.json', load_config)
def json_depth_of_a_config(folder):
    return b'{"a":' * 100_000


# ----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', TRAPS)
def test_traps_are_refused(tmp_path, name):
    check_refused(tmp_path, *TRAPS[name])


@pytest.mark.parametrize('material', ['m.mtl', '/dev/zero', 'x.obj'])
def test_a_mesh_opens_no_other_file(tmp_path, material):
    """Its materials are not read: a pipe would be waited for."""
    need_open3d()
    os.mkfifo(tmp_path / 'm.mtl')
    path = tmp_path / 'x.obj'
    path.write_bytes(f'mtl\\\nlib {material}\nmtllib {material}\nusemtl a\n'.encode() + TRIANGLE + b'f 1 2 \\\n3\n')
    points = read_cloud(path).points
    assert points.shape == (10_000, 6) and points[:, :3].min() >= 0 and points[:, :2].sum(1).max() <= 1 + 1e-6


def test_plain_yaml_is_a_config(tmp_path):
    (tmp_path / 'base.yaml').write_text('a: 1\nb: {c: [1, 2]}\n')
    (tmp_path / 'x.yaml').write_text('_base_: [base.yaml]\na: 2\n')
    cfg = load_config(str(tmp_path / 'x.yaml'))
    assert cfg.a == 2 and cfg.b.c == [1, 2]


def test_pickles_of_data_sets_are_read(tmp_path):
    path, content = Path(tmp_path / 'x.pkl'), {b'data': np.ones((2, 3)), 'names': ['a', ('b', 1)], 3: {1.5: None}}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(content, protocol))
        found = read_numpy_pickle(path)
        assert (found.pop(b'data') == 1).all() and found == {k: v for k, v in content.items() if k != b'data'}
