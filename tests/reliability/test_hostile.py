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

import ewa3d
from ewa3d import runs
from ewa3d.datasets import CIFAR100, FewShot, ModelNet, VideoDataset
from ewa3d.datasets.images import decode_image
from ewa3d.datasets.io import read_cloud, read_h5
from ewa3d.datasets.parts import read_json
from ewa3d.datasets.pickles import read_numpy_pickle
from ewa3d.datasets.scenes import read_array, read_boxes
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.fusing import fuse_checkpoint
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


@hostile('2way_1shot/0.pkl', lambda path: FewShot(path.parents[1], way=2, shot=1, cache_dir=None))
def fold_that_runs(folder):
    items = [(touch(folder), 0, 0), (np.ones((4, 3)), 1, 1)]
    return pickle.dumps(dict(train=items, test=items), 2)


@hostile('modelnet40_train_8192pts_fps.dat', lambda path: ModelNet(path.parent, cache_dir=None))
def dat_that_runs(folder):
    return pickle.dumps([[np.ones((4, 6), np.float32)], [touch(folder)]])


@hostile('meta', lambda path: CIFAR100(path.parent))
def names_of_classes_that_run(folder):
    return pickle.dumps(dict(fine_label_names=touch(folder)), 2)


@hostile('x.pth', read_checkpoint)
def pickle_in_a_state(folder):
    """A reduce in the place of a tensor, deep inside of an optimizer's state."""
    command = Runs(os.system, (f'mkdir {folder}/it-ran',))
    return saved(dict(state_dict={}, optimizer=dict(state={0: dict(exp_avg=command)})))


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


def png_of(side: int) -> bytes:
    """A picture of zeros: little to store, ``3 * side ** 2`` bytes in memory."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0))
            + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


for _side in (10_000, 100_000):
    HOSTILE[f'png_of_{_side}'] = 'x.png', decode_image, lambda folder, side=_side: png_of(side)


@hostile('list.txt', lambda path: VideoDataset(path.parent, ann_file='list.txt'))
def list_that_means_many_classes(folder):
    return f'clip {BILLION}\n'.encode()


def stored_model(**changes) -> bytes:
    """A checkpoint with the config of a model: what ``ewa3d.build`` and ``ewa3d fuse`` go by."""
    model = dict(type='TaskModel', backbone=dict(
        type='TokenEncoder', embed_dim=16, num_heads=2, tokenizer=dict(
            type='PointPatchEmbed', num_groups=6, group_size=6, embed_dim=16, widths=(8, 8, 16), pos_dim=8)),
        neck=dict(type='TokenPool'), head=dict(type='ClsHead', num_classes=2))
    model['backbone'].update({'depth': 2, **changes})
    return saved(dict(state_dict=dict(a=torch.ones(3)), meta=dict(cfg=dict(model=model))))


READERS_OF_MODELS = dict(build=ewa3d.build, fuse=lambda path: fuse_checkpoint(path, path.with_name('out.pth')))
for _name, _reader in READERS_OF_MODELS.items():
    HOSTILE[f'{_name}_deep'] = 'x.pth', _reader, lambda folder: stored_model(depth=10 ** 9)
    HOSTILE[f'{_name}_wide'] = 'x.pth', _reader, lambda folder: stored_model(embed_dim=10 ** 7)
    HOSTILE[f'{_name}_code'] = 'x.pth', _reader, lambda folder: stored_model(type='os.mkdir')
    HOSTILE[f'{_name}_import'] = 'x.pth', _reader, lambda folder: stored_model(custom_imports=dict(imports=['this']))


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


@hostile('x.safetensors', read_checkpoint)
def safetensors_that_overlap(folder):
    tensor = dict(dtype='F32', shape=[4], data_offsets=[0, 16])
    header = json.dumps(dict(a=tensor, b=tensor)).encode()
    return struct.pack('<Q', len(header)) + header + bytes(16)


@hostile('x.safetensors', read_checkpoint)
def safetensors_that_begin_elsewhere(folder):
    header = json.dumps(dict(a=dict(dtype='F32', shape=[2 ** 62, 4], data_offsets=[2 ** 63, 2 ** 63 + 16]))).encode()
    return struct.pack('<Q', len(header)) + header + bytes(16)


@hostile('x.obj', read_cloud)
def obj_with_a_face_of_vertices_that_are_not_there(folder):
    return f'v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 {BILLION}\nf 1 2 4\nf -9 -8 -7\n'.encode()


@hostile('x.json', read_json)
def json_depth(folder):
    return b'[' * 500_000


@hostile('confusion.json', runs.read_json)
def json_depth_of_a_run(folder):
    return b'{"a":' * 500_000


@hostile('metrics.jsonl', runs.read_metrics)
def json_depth_of_a_line(folder):
    return b'[' * 500_000 + b'\n' + b'{"mode":' * 200_000


@hostile('x.json', read_boxes)
def json_depth_of_boxes(folder):
    return b'{"boxes":' * 200_000


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


@hostile('x.h5', read_cloud)
def h5_link_to_itself(folder):
    with h5py.File(folder / 'x.h5', 'w') as file:
        file['points'] = h5py.SoftLink('/points')


@hostile('x.pth', read_checkpoint)
def tar_that_leads_elsewhere(folder):
    """The oldest format of torch is a tar file, which it unpacks."""
    with tarfile.open(folder / 'x.pth', 'w') as archive:
        for name in ('../it-ran', 'sys_info', 'pickle', 'storages', 'tensors', str(folder / 'it-ran')):
            archive.addfile(tarfile.TarInfo(name))


@hostile('x.pth', read_checkpoint)
def zip_that_leads_elsewhere(folder):
    with zipfile.ZipFile(folder / 'x.pth', 'w') as archive:
        archive.writestr('x/data.pkl', pickle.dumps(touch(folder), 2))
        for name in ('../it-ran', str(folder / 'it-ran')):
            archive.writestr(name, b'')


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


def check_refused(folder: Path, file: str, reader, make) -> None:
    """An error that names the file, within bounds, and nothing ran."""
    path = folder / file
    if path.suffix in ('.ply', '.pcd', '.stl', '.obj'):
        need_open3d()
    path.parent.mkdir(exist_ok=True)
    content = make(folder)
    if content is not None:
        path.write_bytes(content)
    found = limited(reader, path)
    assert found['kind'] == 'ValueError' and str(path) in found['text'], found
    assert found['megabytes'] < MEGABYTES and len(found['text']) < 1500
    assert not (folder / 'it-ran').exists()


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    check_refused(tmp_path, *HOSTILE[name])


def test_names_in_an_archive_lead_nowhere(tmp_path):
    """Archives are read, never unpacked: an array with the name of a place elsewhere is an array."""
    with zipfile.ZipFile(tmp_path / 'x.npz', 'w') as archive:
        archive.writestr('../it-ran.npy', npy_header((2, 3)) + bytes(48))
    assert read_cloud(tmp_path / 'x.npz').points.shape == (2, 3)
    assert [path.name for path in tmp_path.iterdir()] == ['x.npz'] and not (tmp_path.parent / 'it-ran.npy').exists()


def test_the_corpus_is_counted():
    print(f'\n{len(HOSTILE)} hostile files, each refused within {SECONDS} s and {MEGABYTES} MB, nothing run')
