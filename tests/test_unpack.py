"""Archives, good ones and ones that were made to harm: refused with an error that names them, and nothing is left."""
import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from ewa3d import unpack as module
from ewa3d.unpack import inside, look_into, remove_unfinished, unpack

FILES = {'top/a.txt': b'abc', 'top/b/ü.txt': b'', 'top/b/点云/c.bin': bytes(range(256)) * 300}


def make_zip(path: Path, files=FILES, compression=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def make_tar(path: Path, files=FILES, mode: str = 'w:gz', members=(), **options) -> Path:
    with tarfile.open(path, mode, **options) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in members:
            archive.addfile(info)
    return path


def tar_info(name: str, kind: bytes, link: str = '', size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def nothing_left(tmp_path: Path, archive: Path) -> bool:
    return [path.name for path in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize('make', [
    make_zip, make_tar, lambda p: make_zip(p, compression=zipfile.ZIP_STORED), lambda p: make_tar(p, mode='w'),
    lambda p: make_tar(p, format=tarfile.GNU_FORMAT), lambda p: make_tar(p, format=tarfile.PAX_FORMAT),
    lambda p: make_tar(p, members=[tar_info('./', tarfile.DIRTYPE), tar_info('top/b', tarfile.DIRTYPE)]),
    lambda p: make_zip(p, dict({'top/': b'', './top/b/': b'', '__MACOSX/top/._a.txt': b'x', 'x': b'x'}, **FILES)),
])
def test_good_archives(tmp_path, make):
    archive = make(tmp_path / 'x.part')  # its content tells what it is
    assert look_into(archive, 'top') == sum(map(len, FILES.values()))
    unpack(archive, tmp_path / 'here', 'top')
    found = {f'top/{path.relative_to(tmp_path / "here").as_posix()}': path.read_bytes()
             for path in (tmp_path / 'here').rglob('*') if path.is_file()}
    assert found == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ['here', 'x.part']
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / 'here').stat().st_mode) == 0o777 & ~umask  # a temporary folder is private
    with pytest.raises(FileExistsError, match='here is there already'):
        unpack(archive, tmp_path / 'here', 'top')


# ---- names and kinds that are refused -------------------------------------------------------------------------------
NAMES = ['/etc/x', '../x', 'top/../../x', 'top/..', 'C:/x', 'c:x', 'top\\..\\x', 'top/a\nb']


@pytest.mark.parametrize('make', [make_zip, make_tar])
@pytest.mark.parametrize('name', NAMES)
def test_names_that_lead_elsewhere(tmp_path, make, name):
    (tmp_path / 'in').mkdir()
    archive = make(tmp_path / 'in' / 'x', dict(FILES, **{name: b'!'}))
    with pytest.raises(ValueError, match=r'in/x: the name .* refused'):
        unpack(archive, tmp_path / 'in' / 'here', 'top')
    assert nothing_left(tmp_path / 'in', archive) and nothing_left(tmp_path, tmp_path / 'in')


def test_names():
    assert inside('./a//b/./c') == ('a', 'b', 'c') and inside('./') == ()
    assert inside('a/..b/c..') == ('a', '..b', 'c..')
    for name in NAMES:
        with pytest.raises(ValueError):
            inside(name)


@pytest.mark.parametrize('info', [
    tar_info('top/x', tarfile.SYMTYPE, '/etc/passwd'), tar_info('top/x', tarfile.SYMTYPE, 'a.txt'),
    tar_info('top/x', tarfile.LNKTYPE, 'top/a.txt'), tar_info('top/x', tarfile.CHRTYPE),
    tar_info('top/x', tarfile.BLKTYPE), tar_info('top/x', tarfile.FIFOTYPE),
    tar_info('top/b', tarfile.SYMTYPE, '..'),
])
def test_links_and_devices_in_tar_files(tmp_path, info):
    archive = make_tar(tmp_path / 'x', members=[info])
    with pytest.raises(ValueError, match='is a link, a device or a sparse file'):
        unpack(archive, tmp_path / 'here', 'top')
    assert nothing_left(tmp_path, archive)


@pytest.mark.parametrize('kind', [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_in_zip_files(tmp_path, kind):
    with zipfile.ZipFile(tmp_path / 'x', 'w') as file:
        info = zipfile.ZipInfo('top/x')
        info.external_attr = (kind | 0o777) << 16
        file.writestr(info, '/etc/passwd')
    with pytest.raises(ValueError, match='is a link or a device'):
        unpack(tmp_path / 'x', tmp_path / 'here', 'top')
    assert nothing_left(tmp_path, tmp_path / 'x')


@pytest.mark.parametrize(('names', 'text'), [
    (['top/a', 'top/a'], 'is in it twice'), (['top/a', 'top/./a'], 'is in it twice'),
    (['top/a', 'top/a/b'], 'lies in a folder that is a file'), (['top/a/b', 'top/a'], 'is in it twice'),
    (['top/a/b/c', 'top/a'], 'is in it twice'), (['top/a', 'top'], 'is in it twice'),
    (['top', 'top/a'], 'lies in a folder that is a file'), ([], "in the folder 'top', and holds nothing"),
    (['top/'], 'and holds nothing'), (['Top/a', 'b'], "in the folder 'top', and holds Top, b"),
])
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_members_that_are_in_the_way_of_others(tmp_path, names, text):
    with zipfile.ZipFile(tmp_path / 'x', 'w') as file:
        for name in names:
            file.writestr(name, '' if name.endswith('/') else 'x')
    with pytest.raises(ValueError, match=f'x: .*({text})'):
        unpack(tmp_path / 'x', tmp_path / 'here', 'top')
    assert nothing_left(tmp_path, tmp_path / 'x')


def test_names_that_one_disk_cannot_tell_apart(tmp_path, monkeypatch):
    def collide(member, folder, top):
        raise FileExistsError(17, 'File exists', str(folder / 'A.TXT'))

    monkeypatch.setattr(module, '_write', collide)
    with pytest.raises(ValueError, match=r"'A\.TXT' is in it twice, in other letters"):
        unpack(make_zip(tmp_path / 'x'), tmp_path / 'here', 'top')


# ---- little that unpacks to much ------------------------------------------------------------------------------------
@pytest.mark.parametrize('make', [make_zip, make_tar])
def test_more_than_was_expected(tmp_path, make, monkeypatch):
    archive = make(tmp_path / 'x', {f'top/{i}': bytes(10_000) for i in range(4)})
    assert look_into(archive, 'top', 40_000) == 40_000
    with pytest.raises(ValueError, match='is larger than 39999 bytes: refused'):
        unpack(archive, tmp_path / 'here', 'top', 39_999)
    monkeypatch.setattr(module, 'ROOM', 1000)
    monkeypatch.setattr(module, 'RATIO', 2)
    with pytest.raises(ValueError, match='refused'):
        unpack(archive, tmp_path / 'here', 'top')
    monkeypatch.setattr(module, 'MEMBERS', 3)
    with pytest.raises(ValueError, match='more than 3 members'):
        look_into(archive, 'top', 40_000)
    assert nothing_left(tmp_path, archive)


def test_sizes_that_lie(tmp_path):
    archive = make_zip(tmp_path / 'x', {'top/a': bytes(100_000)})
    raw = archive.read_bytes()
    archive.write_bytes(raw.replace(struct.pack('<I', 100_000), struct.pack('<I', 10)))
    with pytest.raises(ValueError, match='broken or cut off'):
        unpack(archive, tmp_path / 'here', 'top')
    assert nothing_left(tmp_path, archive)


@pytest.mark.parametrize('kind', [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_headers_that_are_read_into_memory(tmp_path, kind):
    header = tar_info('top/x', kind, size=1 << 40).tobuf(tarfile.GNU_FORMAT)
    (tmp_path / 'x').write_bytes(gzip.compress(header + bytes(10 ** 6)))
    with pytest.raises(ValueError, match=r'a header of .* bytes is refused'):
        unpack(tmp_path / 'x', tmp_path / 'here', 'top')


@pytest.mark.parametrize(('info', 'text'), [
    (tar_info('top/x', tarfile.REGTYPE, size=1 << 40), 'is larger than'),
    (tar_info('top/x', tarfile.REGTYPE, size=-(1 << 20)), 'is a link, a device or a sparse file'),
    (tar_info('top/x', tarfile.GNUTYPE_SPARSE, size=100), 'sparse|broken'),
])
def test_sizes_in_tar_files(tmp_path, info, text):
    (tmp_path / 'x').write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(10_240)))
    with pytest.raises(ValueError, match=text):
        unpack(tmp_path / 'x', tmp_path / 'here', 'top')
    assert nothing_left(tmp_path, tmp_path / 'x')


def test_a_stream_without_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'ROOM', 0)
    raw = gzip.decompress(make_tar(tmp_path / 'x').read_bytes())
    (tmp_path / 'x').write_bytes(gzip.compress(raw + bytes(10 ** 6)))
    with pytest.raises(ValueError, match='is larger than 200000 bytes'):
        look_into(tmp_path / 'x', 'top', 100_000)


# ---- broken ones ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('make', [make_zip, make_tar, lambda p: make_tar(p, mode='w')])
@pytest.mark.parametrize('share', [.02, .3, .6, .9, .99])
def test_archives_that_are_cut_off(tmp_path, make, share):
    archive = make(tmp_path / 'x')
    raw = archive.read_bytes()
    archive.write_bytes(raw[:int(share * len(raw.rstrip(b'\0')))])
    with pytest.raises(ValueError, match=r'x: (broken or cut off|is neither)'):
        unpack(archive, tmp_path / 'here', 'top')
    assert nothing_left(tmp_path, archive)


@pytest.mark.parametrize('make', [make_zip, make_tar])
def test_bits_that_flipped(tmp_path, make):
    archive = make(tmp_path / 'x')
    raw = bytearray(archive.read_bytes())
    raw[len(raw) // 2] ^= 255
    archive.write_bytes(raw)
    with pytest.raises(ValueError, match='x: '):
        unpack(archive, tmp_path / 'here', 'top')
    assert nothing_left(tmp_path, archive)


@pytest.mark.parametrize('content', [b'', b'<!DOCTYPE html>', b'\x1f\x8b', b'PK\3\4', b'\x1f\x8b' + bytes(600),
                                     bytes(9999)])
def test_what_is_no_archive(tmp_path, content):
    (tmp_path / 'x').write_bytes(content)
    with pytest.raises(ValueError, match=r'x: (broken or cut off|is neither a zip nor a tar)'):
        unpack(tmp_path / 'x', tmp_path / 'here', 'top')


def test_encrypted(tmp_path):
    raw = bytearray(make_zip(tmp_path / 'x', {'top/a': b'abc'}).read_bytes())
    raw[raw.index(b'PK\1\2') + 8] |= 1
    (tmp_path / 'x').write_bytes(raw)
    with pytest.raises(ValueError, match='is encrypted'):
        look_into(tmp_path / 'x', 'top')


def test_nothing_is_left_of_what_was_not_finished(tmp_path, monkeypatch):
    archive = make_zip(tmp_path / 'x')
    monkeypatch.setattr('ewa3d.download.shutil.disk_usage', lambda path: type('', (), dict(free=100)))
    with pytest.raises(OSError, match='are needed to unpack x'):
        unpack(archive, tmp_path / 'here', 'top')
    monkeypatch.undo()

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, 'copyfileobj', stop)
    with pytest.raises(KeyboardInterrupt):
        unpack(archive, tmp_path / 'here', 'top')
    assert nothing_left(tmp_path, archive)
    (tmp_path / '.here.abc.tmp' / 'top').mkdir(parents=True)  # of a process that was killed
    remove_unfinished(tmp_path / 'here')
    assert nothing_left(tmp_path, archive)
