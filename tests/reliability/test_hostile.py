"""Files that were made to harm: refused with an error that names them, within bounded time and memory, nothing run."""
import functools
import gzip
import io
import json
import os
import pickle
import resource
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from faults import need_open3d

from ewa3d.datasets.images import decode_image
from ewa3d.datasets.io import read_cloud, read_h5
from ewa3d.datasets.parts import read_json
from ewa3d.datasets.pickles import read_numpy_pickle
from ewa3d.datasets.scenes import read_array, read_boxes
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.unpack import unpack

BILLION = 10 ** 12
SECONDS, MEGABYTES = 20, 400  # of processor time and of memory that a refusal may take
BOX = 'property float x\nproperty float y\nproperty float z\n'
HOSTILE: dict = {}  # name → (file name, reader, function that gives the content or writes the file)


def hostile(name: str, reader):
    def add(make):
        HOSTILE[make.__name__] = name, reader, make
        return make
    return add


class Runs:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def touch(folder: Path) -> Runs:
    return Runs(os.mkdir, (str(folder / 'it-ran'),))


# ---- pickles --------------------------------------------------------------------------------------------------------
def saved(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@hostile('x.pth', read_checkpoint)
def checkpoint_that_runs(folder):
    return saved(dict(state_dict={'a': torch.ones(1)}, meta=touch(folder)))


@hostile('x.pth', read_checkpoint)
def old_checkpoint_that_runs(folder):
    return saved(dict(state_dict=touch(folder)), _use_new_zipfile_serialization=False)


@hostile('x.pth', read_checkpoint)
def bare_pickle_that_runs(folder):
    return pickle.dumps(touch(folder), 2)


@hostile('x.pth', read_checkpoint)
def checkpoint_of_eval(folder):
    return saved(Runs(eval, (f'__import__("os").mkdir({str(folder / "it-ran")!r})',)))


@hostile('data_batch_1', read_numpy_pickle)
def batch_that_runs(folder):
    return pickle.dumps({'data': touch(folder), 'labels': []}, 2)


@hostile('fold.pkl', read_numpy_pickle)
def object_array_in_a_pickle(folder):
    return pickle.dumps([np.array([touch(folder)], dtype=object)], 4)


@hostile('x.npy', read_cloud)
def object_array(folder):
    np.save(folder / 'x.npy', np.array([[touch(folder)] * 3], dtype=object), allow_pickle=True)


@hostile('x.npz', read_cloud)
def object_array_in_an_archive(folder):
    np.savez(folder / 'x.npz', points=np.array([[touch(folder)] * 3], dtype=object))


@hostile('x.npz', functools.partial(read_array, columns=3, key='pc'))
def object_array_of_a_scene(folder):
    np.savez(folder / 'x.npz', pc=np.array([[touch(folder)] * 3], dtype=object))


@hostile('x.npy', read_cloud)
def pickle_with_the_name_of_an_array(folder):
    return pickle.dumps(touch(folder))


# ---- little that unfolds to much -------------------------------------------------------------------------------------
def laughs(depth: int = 60) -> list:
    value = ['ha'] * 4
    for _ in range(depth):
        value = [value, value, value]
    return value


@hostile('x.pth', read_checkpoint)
def lists_that_hold_one_another(folder):
    return saved(dict(format_version=1, checksum='', meta={}, state_dict={}, more=laughs()))


@hostile('x.pth', read_checkpoint)
def lists_in_a_foreign_checkpoint(folder):
    return saved(dict(state_dict=dict(a=torch.ones(1)), more=laughs()))


@hostile('x.pth', read_checkpoint)
def nested_deeply(folder):
    return b'\x80\x02' + b']' * 300_000 + b'a' * 299_999 + b'.'


@hostile('x.pth', read_checkpoint)
def tensor_of_one_number(folder):
    return saved(dict(format_version=1, checksum='', meta={}, state_dict=dict(a=torch.ones(1).expand(10 ** 11))))


@hostile('x.pth', read_checkpoint)
def packed_checkpoint(folder):
    with zipfile.ZipFile(folder / 'x.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, content in (('data.pkl', b'\x80\x02}.'), ('version', b'3')):
            archive.writestr(f'x/{name}', content)
        with archive.open('x/data/0', 'w', force_zip64=True) as file:
            for _ in range(42):
                file.write(bytes(8 * 10 ** 6))


def npy_header(shape: tuple) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr='<f8', fortran_order=False, shape=shape))
    return buffer.getvalue()


@hostile('x.npy', read_cloud)
def npy_that_announces_much(folder):
    return npy_header((BILLION, 3)) + bytes(240)


@hostile('x.npy', read_cloud)
def npy_that_announces_gigabytes(folder):
    return npy_header((10 ** 9, 3)) + bytes(240)


@hostile('x.npz', read_cloud)
def archive_bomb(folder):
    with zipfile.ZipFile(folder / 'x.npz', 'w', zipfile.ZIP_DEFLATED) as archive, \
            archive.open('points.npy', 'w', force_zip64=True) as file:
        file.write(npy_header((14 * 10 ** 6, 3)))
        for _ in range(42):
            file.write(bytes(8 * 10 ** 6))


@hostile('x.h5', read_cloud)
def h5_of_nothing(folder):
    with h5py.File(folder / 'x.h5', 'w') as file:
        file.create_dataset('points', (2 * 10 ** 10, 3), 'f8', chunks=(1000, 3), compression='gzip')


@hostile('x.h5', lambda path: read_h5(path, 'data'))
def h5_bomb(folder):
    with h5py.File(folder / 'x.h5', 'w') as file:
        data = file.create_dataset('data', (6 * 10 ** 5, 60), 'f8', chunks=(10 ** 5, 60), compression='gzip')
        for start in range(0, len(data), 10 ** 5):
            data[start:start + 10 ** 5] = 0.


# ---- headers that lie ------------------------------------------------------------------------------------------------
def ply(layout: str, properties: str, body: bytes = b'', count: int = BILLION, more: str = '') -> bytes:
    return f'ply\nformat {layout} 1.0\nelement vertex {count}\n{properties}{more}end_header\n'.encode() + body


for _layout in ('ascii', 'binary_little_endian', 'binary_big_endian'):
    HOSTILE[f'ply_{_layout}'] = 'x.ply', read_cloud, lambda folder, layout=_layout: ply(layout, BOX, b'0 0 0\n' * 4)
    HOSTILE[f'ply_{_layout}_without_properties'] = (
        'x.ply', read_cloud, lambda folder, layout=_layout: ply(layout, '', b'0 0 0\n' * 4))
    HOSTILE[f'ply_{_layout}_of_faces'] = (
        'x.ply', read_cloud, lambda folder, layout=_layout: ply(
            layout, BOX, b'0' * 12, 1, f'element face {BILLION}\nproperty list uchar int vertex_indices\n'))


def pcd(data: str, body: bytes, points: int = BILLION, size: str = '4 4 4', width: int | None = None) -> bytes:
    return (f'VERSION 0.7\nFIELDS x y z\nSIZE {size}\nTYPE F F F\nCOUNT 1 1 1\nWIDTH {width or points}\nHEIGHT 1\n'
            f'VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {points}\nDATA {data}\n').encode() + body


@hostile('x.pcd', read_cloud)
def pcd_ascii(folder):
    return pcd('ascii', b'0 0 0\n' * 4)


@hostile('x.pcd', read_cloud)
def pcd_binary(folder):
    return pcd('binary', bytes(48))


@hostile('x.pcd', read_cloud)
def pcd_of_no_size(folder):
    return pcd('binary', bytes(48), 40, '0 0 0')


@hostile('x.pcd', read_cloud)
def pcd_with_two_sizes(folder):
    return pcd('binary', bytes(48), 4, width=10 ** 9)


@hostile('x.pcd', read_cloud)
def pcd_compressed(folder):
    return pcd('binary_compressed', struct.pack('<II', 100, 4 * 10 ** 9) + bytes(100), 10 ** 8)


@hostile('x.stl', read_cloud)
def stl(folder):
    return bytes(80) + struct.pack('<I', 4 * 10 ** 9) + bytes(100)


@hostile('x.off', read_cloud)
def off_of_vertices_and_faces(folder):
    return f'OFF\n{BILLION} {BILLION} 0\n0 0 0\n'.encode()


@hostile('x.off', read_cloud)
def off_of_faces(folder):
    return f'OFF\n1 {BILLION} 0\n0 0 0\n'.encode()


@hostile('x.off', read_cloud)
def off_with_a_face_of_many_corners(folder):
    return f'OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n{BILLION} 0 1 2\n'.encode()


@hostile('x.txt', read_cloud)
def text_that_announces_much(folder):
    return f'{BILLION}\n0 0 0\n'.encode()


@hostile('x.txt', read_cloud)
def text_with_a_number_of_a_million_digits(folder):
    return b'1' * 10 ** 6 + b' 0 0\n'


@hostile('x.safetensors', read_checkpoint)
def safetensors_with_a_long_header(folder):
    return struct.pack('<Q', 2 ** 60) + b'{}'


@hostile('x.safetensors', read_checkpoint)
def safetensors_of_more_than_there_is(folder):
    header = json.dumps(dict(a=dict(dtype='F32', shape=[BILLION], data_offsets=[0, 4 * BILLION]))).encode()
    return struct.pack('<Q', len(header)) + header


@hostile('x.safetensors', read_checkpoint)
def safetensors_with_deep_meta(folder):
    header = json.dumps({'__metadata__': dict(format_version='1', meta='[' * 200_000)}).encode()
    return struct.pack('<Q', len(header)) + header


@hostile('x.json', read_json)
def json_depth(folder):
    return b'[' * 500_000


@hostile('x.json', read_boxes)
def json_depth_of_boxes(folder):
    return b'{"boxes":' * 200_000


@hostile('x.png', decode_image)
def image_bomb(folder):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 100_000, 100_000, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


# ---- links to other files -------------------------------------------------------------------------------------------
def secret(folder: Path) -> str:
    np.arange(30.).tofile(folder / 'secret.bin')
    with h5py.File(folder / 'secret.h5', 'w') as file:
        file['points'] = np.ones((4, 3))
    return str(folder / 'secret.h5')


@hostile('x.h5', read_cloud)
def h5_link_to_a_file(folder):
    with h5py.File(folder / 'x.h5', 'w') as file:
        file['points'] = h5py.ExternalLink(secret(folder), '/points')


@hostile('x.h5', lambda path: read_h5(path, 'points'))
def h5_array_in_another_file(folder):
    secret(folder)
    with h5py.File(folder / 'x.h5', 'w') as file:
        file.create_dataset('points', (10, 3), 'f8', external=[(str(folder / 'secret.bin'), 0, 240)])


@hostile('x.h5', read_cloud)
def h5_array_made_of_other_files(folder):
    layout = h5py.VirtualLayout((4, 3), 'f8')
    layout[:] = h5py.VirtualSource(secret(folder), 'points', (4, 3))
    with h5py.File(folder / 'x.h5', 'w') as file:
        file.create_virtual_dataset('points', layout)


# ---- archives of data sets -------------------------------------------------------------------------------------------
def unpack_beside(path: Path) -> None:
    unpack(path, path.parent / 'here', 'top')


def tar_of(*members: tuple[str, bytes, str, int]) -> bytes:
    """A packed tar file of headers: name, type, where a link leads, size; followed by zeros."""
    raw = b''
    for name, kind, link, size in members:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.size = kind, link, size
        raw += info.tobuf(tarfile.GNU_FORMAT)
    return gzip.compress(raw + bytes(10 ** 5))


@hostile('x.zip', unpack_beside)
def zip_bomb(folder):
    with zipfile.ZipFile(folder / 'x.zip', 'w', zipfile.ZIP_DEFLATED) as archive, \
            archive.open('top/x', 'w', force_zip64=True) as file:
        for _ in range(42):
            file.write(bytes(8 * 10 ** 6))


@hostile('x.zip', unpack_beside)
def zip_that_leaves_the_folder(folder):
    with zipfile.ZipFile(folder / 'x.zip', 'w') as archive:
        archive.writestr('top/a', 'a')
        archive.writestr(f'top/../../{folder.name}/it-ran/x', 'x')


@hostile('x.tar.gz', unpack_beside)
def tar_bomb(folder):
    return tar_of(('top/x', tarfile.REGTYPE, '', BILLION))


@hostile('x.tar.gz', unpack_beside)
def tar_with_a_long_header(folder):
    return tar_of(('top/x', tarfile.XHDTYPE, '', BILLION))


@hostile('x.tar.gz', unpack_beside)
def tar_with_a_size_below_zero(folder):
    return tar_of(('top/x', tarfile.REGTYPE, '', -1024))


@hostile('x.tar.gz', unpack_beside)
def tar_that_writes_through_a_link(folder):
    return tar_of(('top/x', tarfile.SYMTYPE, str(folder), 0), ('top/x/it-ran', tarfile.DIRTYPE, '', 0))


# ----------------------------------------------------------------------------------------------------------------------
def limited(reader, path: Path) -> dict:
    """What a process with little time and memory makes of the file."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found = dict(kind='read', text='')
            try:
                reader(path)
            except BaseException as error:
                found = dict(kind=type(error).__name__, text=str(error)[:4000])
            found['megabytes'] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
            os.write(into, json.dumps(found).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        text = file.read()
    status = os.waitpid(pid, 0)[1]
    assert text, f'the process ended with the status {status}: out of time, or crashed'
    return json.loads(text)


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    file, reader, make = HOSTILE[name]
    path = tmp_path / file
    if path.suffix in ('.ply', '.pcd', '.stl'):
        need_open3d()
    content = make(tmp_path)
    if content is not None:
        path.write_bytes(content)
    found = limited(reader, path)
    assert found['kind'] == 'ValueError' and str(path) in found['text'], found
    assert found['megabytes'] < MEGABYTES and len(found['text']) < 1500
    assert not (tmp_path / 'it-ran').exists()


def test_the_corpus_is_counted():
    print(f'\n{len(HOSTILE)} hostile files, each refused within {SECONDS} s and {MEGABYTES} MB, nothing run')
