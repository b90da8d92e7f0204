"""``ewa3d data prepare`` and ``data check NAME``: against a site on the loopback, and what is only told."""
import json
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from served import Answer, serve

from ewa3d import cli
from ewa3d import download as downloading
from ewa3d.config_files import list_configs
from ewa3d.datasets import sources
from ewa3d.datasets.modelnet import CLASSES
from ewa3d.datasets.prepare import Inventory, configs_of, inventory, prepare, read_record
from ewa3d.datasets.sources import SOURCES, Part, find_source
from ewa3d.registry import DATASETS

NAME, FOLDER = 'modelnet40', 'modelnet40_normal_resampled'
SHAPES = dict(train=['chair_0001', 'night_stand_0002'], test=['chair_0003'])


def content(broken: tuple[str, ...] = (), without: tuple[str, ...] = ()) -> dict[str, str]:
    """The files of a small ModelNet40 in its official layout."""
    files = {'modelnet40_shape_names.txt': '\n'.join(CLASSES[40])}
    for split, names in SHAPES.items():
        files[f'modelnet40_{split}.txt'] = '\n'.join(names)
        for name in names:
            rows = np.random.default_rng(len(files)).normal(size=(40, 6))
            text = '\n'.join(','.join(f'{value:.6f}' for value in row) for row in rows)
            files[f'{name.rpartition("_")[0]}/{name}.txt'] = text if name not in broken else '0,0,nan\n1,1,1'
    return {f'{FOLDER}/{name}': text for name, text in files.items() if name not in without}


def pack(path: Path, files: dict) -> bytes:
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path.read_bytes()


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A site with the archive; the data set of the table is the small one, from there."""
    monkeypatch.setenv('no_proxy', '*')
    monkeypatch.setattr(downloading, 'PAUSE', 0)
    with serve() as site:
        site.packed = pack(tmp_path / 'packed', content())
        site['/m.zip'] = Answer(site.packed)
        change(monkeypatch, urls=(site.url('/m.zip'),))
        yield site


def change(monkeypatch, **archive):
    old = SOURCES[NAME]
    source = replace(old, archive=replace(old.archive, **archive), parts=(*old.parts[:3], Part('*/*.txt', 3)))
    monkeypatch.setitem(SOURCES, NAME, source)
    return source


@pytest.fixture
def root(tmp_path):
    return tmp_path / 'data'


@pytest.fixture
def run(root, capsys):
    """``run('prepare', …)``: exit code, output and error of the command."""

    def run(verb, *argv, name=NAME):
        code = cli.main(['data', verb, name, '--root', str(root), *argv])
        return code, *capsys.readouterr()

    return run


def files_of(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_data_set_is_downloaded_once(site, root, run):
    code, out, err = run('prepare')
    assert code == 0 and err == '', out + err
    assert {f'{FOLDER}/{path.relative_to(root / FOLDER).as_posix()}': path.read_text()
            for path in (root / FOLDER).rglob('*.txt')} == content()
    assert files_of(root) == ['.prepared', FOLDER]  # neither archive nor cache
    record = read_record(SOURCES[NAME], root)
    assert record['sha256'] in out and 'no checksum of it is published' in out and len(record['files']) == 6
    line = f"train_dataloader.dataset=dict(type='ModelNet', variant=40, data_root='{root / FOLDER}', split='train')"
    for text in ('academic research only', line, 'samples: 2 (the whole has 9843)', 'night_stand', 'points a cloud: 40',
                 '*/*.txt: 3 of 3', "ewa3d configs '*_modelnet40-*'"):
        assert text in out, text
    asked = len(site.asked)
    code, out, err = run('prepare')
    assert code == 0 and len(site.asked) == asked and 'complete: nothing to do' in out and line in out
    assert 'samples' not in out


def test_archives_are_kept_and_used(site, root, run):
    assert run('prepare', '--keep-archives')[0] == 0
    archive = root / SOURCES[NAME].archive.name
    assert archive.read_bytes() == site.packed
    (root / FOLDER).rename(root / 'old')
    site.asked.clear()
    code, out, _ = run('prepare', '--offline')
    assert code == 0 and not site.asked and archive.is_file() and 'which was there' in out
    (root / FOLDER).rename(root / 'older')
    archive.unlink()
    code, _, err = run('prepare', '--offline')
    assert code == 2 and '--offline downloads nothing' in err and site.url('/m.zip') in err and err.count('\n') == 1
    archive.write_bytes(b'<html>')
    code, _, err = run('prepare')
    assert code == 2 and f'{archive}: is neither a zip nor a tar' in err and archive.read_bytes() == b'<html>'


def test_an_archive_that_was_there_is_not_touched(site, root, run, monkeypatch):
    source = change(monkeypatch, checksum='md5:' + '0' * 32)
    root.mkdir()
    (root / source.archive.name).write_bytes(site.packed)
    code, _, err = run('prepare')
    assert code == 2 and '0' * 32 in err and (root / source.archive.name).read_bytes() == site.packed


def test_mirrors(site, root, run):
    site['/page'] = Answer(b'<html>Log in</html>')
    site['/cut'] = Answer(site.packed[:-40], length=False)
    code, out, _ = run('prepare', '--url', site.url('/gone'), site.url('/page'), site.url('/cut'))
    assert code == 0 and site.url('/m.zip') in out
    assert [path for path, *_ in site.asked] == ['/gone', '/page', '/cut', '/m.zip']


def test_no_mirror_at_all(site, root, run):
    site['/m.zip'] = Answer(b'<html>Log in</html>')
    code, _, err = run('prepare', '--url', site.url('/gone'))
    assert code == 2 and err.count('\n') == 1 and '/gone: 404' in err and 'is neither a zip nor a tar' in err
    assert files_of(root) == ['.prepared']


def test_checksums(site, root, run, monkeypatch):
    change(monkeypatch, checksum='sha256:' + '0' * 64, attributed='somebody')
    code, _, err = run('prepare')
    assert code == 2 and '0' * 64 in err and 'it is deleted' in err and files_of(root) == ['.prepared']
    digest = downloading.hashlib.sha256(site.packed).hexdigest()
    change(monkeypatch, checksum=f'sha256:{digest}', size=len(site.packed))
    code, out, _ = run('prepare')
    assert code == 0 and 'its sha256 is the one known from somebody' in out


def test_an_archive_that_breaks_while_it_is_unpacked(site, root, run):
    broken = bytearray(site.packed)
    broken[len(broken) // 2] ^= 255  # in the content of a file: the list of files is whole
    site['/m.zip'] = Answer(bytes(broken))
    code, _, err = run('prepare')
    assert code == 2 and 'broken or cut off' in err and files_of(root) == ['.prepared']
    site['/m.zip'] = Answer(site.packed)
    assert run('prepare')[0] == 0


@pytest.mark.parametrize('name', ['../../evil', '/tmp/evil', f'{FOLDER}/../../evil'])
def test_hostile_archives(site, root, run, tmp_path, name):
    site['/m.zip'] = Answer(pack(tmp_path / 'hostile', dict(content(), **{name: 'x'})))
    code, _, err = run('prepare')
    assert code == 2 and 'leads out of the folder' in err and files_of(root) == ['.prepared']
    assert not list(tmp_path.rglob('evil'))


def test_bombs(site, root, run, monkeypatch):
    change(monkeypatch, most=3000)
    code, _, err = run('prepare')
    assert code == 2 and 'is larger than 3000 bytes' in err and files_of(root) == ['.prepared']


def test_what_is_in_the_way_is_left(site, root, run):
    (root / FOLDER).mkdir(parents=True)
    assert run('prepare')[0] == 0  # an empty folder is nothing
    (root / FOLDER / 'modelnet40_train.txt').unlink()
    site.asked.clear()
    code, _, err = run('prepare')
    assert code == 2 and not site.asked and 'missing or wrong: modelnet40_train.txt: 0' in err
    assert 'rename or delete it first' in err


def test_an_archive_that_lacks_something(site, root, run, tmp_path):
    site['/m.zip'] = Answer(pack(tmp_path / 'less', content(without=('chair/chair_0003.txt',))))
    code, out, _ = run('prepare')
    assert code == 1 and 'missing: */*.txt: 2 of 3' in out and 'reading' not in out
    code, out, _ = run('check')
    assert code == 1 and 'wrong: ' in out and 'chair_0003.txt' in out


def test_interrupted(site, root, run, monkeypatch):
    update, part = downloading.Progress.update, root / f'{SOURCES[NAME].archive.name}.part'

    def interrupt(bar, *args):
        if part.exists():
            raise KeyboardInterrupt
        update(bar, *args)

    monkeypatch.setattr(downloading.Progress, 'update', interrupt)
    code, _, err = run('prepare')
    assert code == 130 and err == 'interrupted; the same command continues\n' and part.exists()
    monkeypatch.setattr(downloading.Progress, 'update', update)
    there = part.stat().st_size  # what had arrived by then: one piece or all of them
    assert there and run('prepare')[0] == 0 and site.asked[-1][1] == f'bytes={there}-' and not part.exists()


def test_folders_that_cannot_be_written_to(site, root, run, monkeypatch):
    root.write_text('')
    code, _, err = run('prepare')
    assert code == 2 and 'is a file; a folder was expected' in err
    root.unlink()
    monkeypatch.setattr('ewa3d.files.os.access', lambda *args: False)
    code, _, err = run('prepare')
    assert code == 2 and 'cannot be written to' in err and not site.asked


def test_no_space(site, root, run, monkeypatch):
    monkeypatch.setattr(downloading.shutil, 'disk_usage', lambda path: type('', (), dict(free=10)))
    code, _, err = run('prepare')
    assert code == 2 and 'are needed to download' in err and files_of(root) == ['.prepared']


# ---- data check -----------------------------------------------------------------------------------------------------
def test_what_was_unpacked_is_compared(site, root, run, tmp_path):
    run('prepare')
    source, folder = SOURCES[NAME], root / FOLDER
    (folder / 'more.txt').write_text('x')  # what somebody adds is theirs
    assert inventory(source, root).complete
    file = folder / 'chair' / 'chair_0001.txt'
    file.write_text(file.read_text() + '\n')
    found = inventory(source, root)
    assert not found.complete and len(found.wrong) == 1 and 'chair/chair_0001.txt (' in found.wrong[0]
    file.unlink()
    code, out, _ = run('check')
    assert code == 1 and 'missing: of the 6 files that were unpacked: chair/chair_0001.txt' in out
    folder.rename(root / 'old')
    site['/m.zip'] = Answer(pack(tmp_path / 'other', dict(content(), **{f'{FOLDER}/chair/other.txt': '1,1,1'})))
    code, out, _ = run('prepare')
    assert code == 0 and 'another file than the one prepared here before' in out


@pytest.mark.parametrize('record', ['', '[]', '{"archive": 1}', '{"files": []}', 'null'])
def test_records_that_cannot_be_read(site, root, run, record):
    run('prepare')
    (root / '.prepared' / f'{NAME}.json').write_text(record)
    assert read_record(SOURCES[NAME], root) == {} and inventory(SOURCES[NAME], root).complete


def test_every_file_that_is_wrong_is_told(site, root, run, tmp_path):
    pack(tmp_path / 'bad', content(broken=('chair_0001', 'night_stand_0002')))
    with zipfile.ZipFile(tmp_path / 'bad') as archive:
        archive.extractall(root)
    code, out, _ = run('check')
    assert code == 1 and 'wrong' in out
    for name in SHAPES['train']:
        assert re.search(rf'wrong: .*{name}\.txt: 1 of 2 points have NaN', out), out
    code, out, _ = run('check', '--split', 'test')
    assert code == 0 and 'train_dataloader' not in out and not (root / '.cache').exists()


def test_check_of_what_is_not_there(root, run):
    for name in SOURCES:
        code, out, _ = run('check', name=name)
        assert code == 1 and f'ewa3d data prepare {name} --root {root}' in out and SOURCES[name].terms in out


def test_known_checksums_of_files(root):
    source = find_source('cifar100')
    (root / source.folder).mkdir(parents=True)
    (root / source.folder / 'train').write_bytes(b'x')
    found = inventory(source, root)
    assert found.there == ['train'] and found.missing == ['meta: 0', 'test: 0']
    assert len(found.wrong) == 1 and '1 bytes with the md5 9dd4e461' in found.wrong[0]
    assert str(Inventory(root, ['a'], ['b'], ['c'], ['d'])).splitlines() == [
        f'  folder: {root}', '  there: a', '  missing: b', '  wrong: c', '  note: d']


# ---- the table ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', SOURCES)
def test_the_table(name, root):
    source = find_source(name)
    assert source.name == name and source.page.startswith('http') and source.parts
    assert name == 'cifar100' or list_configs(source.configs)
    for _, cfg in configs_of(source, root):
        assert cfg['type'] in DATASETS and cfg['split'] in DATASETS.get(cfg['type']).SPLITS
    told = source.told_steps(root)
    assert '{' not in told.replace('{train,val,test}', '') and (told or source.archive.urls)
    if source.archive is not None:
        assert all(re.fullmatch(r'https?://[^ ]+/[\w.-]+', url) for url in source.archive.urls)
        kind, _, digest = (source.archive.checksum or '').partition(':')
        assert len(digest) == {'': 0, 'md5': 32, 'sha256': 64}[kind] and bool(digest) <= bool(source.archive.attributed)
    for part in source.parts:
        assert re.fullmatch(r'([0-9a-f]{32})?', part.md5) and part.count > 0


def test_the_table_in_the_documentation():
    text = (Path(__file__).parents[1] / 'data' / 'README.md').read_text()
    for name, source in SOURCES.items():
        row = next(line for line in text.splitlines() if line.startswith(f'| `{name}` |'))
        archive = source.archive
        if archive is not None and archive.checksum:
            assert archive.checksum.partition(':')[2] in row
        if archive is not None and archive.size:
            assert f'{archive.size:,} bytes' in row


def test_names():
    with pytest.raises(KeyError, match="did you mean 'modelnet40'"):
        find_source('modelnet4O')
    assert cli.main(['data', 'prepare', 'cifra10']) == 2
    assert len(SOURCES) == len(sources._ALL)


@pytest.mark.parametrize('name', [name for name, source in SOURCES.items() if source.steps])
def test_what_has_to_be_done_by_hand(root, run, name):
    code, out, err = run('prepare', name=name)
    assert code == 1 and err == '' and f'Then: ewa3d data check {name} --root {root}' in out
    assert str(root) in out and SOURCES[name].page in out and '1. ' in out


def test_an_archive_that_was_asked_for(root, run, tmp_path):
    import h5py
    folder = root / 'h5_files'
    for part in find_source('scanobjectnn').parts:
        file = folder / part.pattern.removeprefix('**/')
        file.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(file, 'w') as h5:
            h5['data'], h5['label'] = np.random.rand(15, 64, 3).astype(np.float32), np.arange(15, dtype=np.int32)
    assert inventory(find_source('scanobjectnn'), root).missing == ['the folder']
    with zipfile.ZipFile(root / 'h5_files.zip', 'w') as archive:
        for file in folder.rglob('*.h5'):
            archive.write(file, file.relative_to(root))
    code, out, _ = run('prepare', name='scanobjectnn')
    assert code == 0 and (root / 'ScanObjectNN' / 'main_split_nobg' / 'test_objectdataset.h5').is_file(), out
    assert out.count('nothing is wrong') == 6 and out.count("variant='objonly'") == 2 and 'pillow' in out
    assert (root / 'h5_files.zip').is_file()
    (root / 'ScanObjectNN').rename(root / 'x')
    (root / 'ScanObjectNN').mkdir()
    folder.rename(root / 'ScanObjectNN' / 'h5_files')  # unpacked by hand
    (root / '.prepared' / 'scanobjectnn.json').unlink()
    assert 'complete: nothing to do' in run('prepare', name='scanobjectnn')[1]


def test_options(root, run, capsys):
    assert run('prepare', '--timeout', '0')[0] == 2
    assert run('prepare', '--url', 'file:///etc/passwd')[2].startswith("error: 'file:///etc/passwd' is no URL")
    with pytest.raises(SystemExit):
        cli.main(['data', 'prepare', '--help'])
    out = capsys.readouterr().out
    assert all(f'  {name} ' in out for name in SOURCES) and 'exit code: 0' in out


def test_from_python(site, root):
    said = []
    assert prepare(SOURCES[NAME], root, keep=True, tell=said.append, sleep=None) and len(said) > 3
    assert json.loads((root / '.prepared' / f'{NAME}.json').read_text())['size'] == len(site.packed)
    assert prepare(SOURCES[NAME], root)
