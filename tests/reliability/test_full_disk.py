"""A file system that is full, or read-only: what was there stays, and a run stops or goes on as it was told."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from faults import WRITERS

from ewa3d.datasets import FolderPointCloud
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.runner import Runner
from ewa3d.files import append_line

PAGE = os.sysconf('SC_PAGE_SIZE')


def mount(folder: Path, *options: str) -> None:
    subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join(options), 'tmpfs', str(folder)], check=True,
                   capture_output=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(['mount', '-o', f'remount,{how}', str(folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    """A file system of a megabyte."""
    folder = tmp_path / 'disk'
    folder.mkdir()
    if shutil.which('mount') is None:
        pytest.skip('there is no mount here')
    try:
        mount(folder, 'size=1m')
    except subprocess.CalledProcessError as error:
        pytest.skip(f'no small file system can be mounted here: {error.stderr.decode().strip()}')
    try:
        yield folder
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


def fill(disk: Path, pages: int = 0) -> Path:
    """Take all space but so many pages."""
    filler = disk / 'filler'
    with filler.open('wb', buffering=0) as file:
        try:
            while True:
                file.write(bytes(PAGE))
        except OSError:
            file.truncate(max(0, file.tell() - pages * PAGE))
    return filler


@pytest.mark.parametrize('name', WRITERS)
def test_what_cannot_be_written_leaves_what_was_there(disk, name):
    write, folder = WRITERS[name], disk / 'run'
    path = write(folder / name, 1)
    before, there = path.read_bytes(), sorted(folder.iterdir())
    for pages in range(-(-len(before) // PAGE)):
        filler = fill(disk, pages)
        with pytest.raises(OSError, match='No space left on device: could not be written and is what') as caught:
            write(path, 2)
        assert str(path) in str(caught.value)
        assert path.read_bytes() == before and sorted(folder.iterdir()) == there
        filler.unlink()
    remount(disk, 'ro')
    with pytest.raises(OSError, match='Read-only file system: could not be written'):
        write(path, 2)
    remount(disk, 'rw')
    assert write(path, 2).read_bytes() != before


def test_a_cache_that_does_not_fit(disk, tmp_path):
    for name in 'ab':
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(3):
            np.save(tmp_path / 'data' / name / f'{i}.npy', np.random.default_rng(i).normal(size=(300, 3)))
    where, fitted = disk / 'cache', 0
    for pages in (0, 1, 2, 3, 5, 7, 8, 40):
        filler = fill(disk, pages)
        try:
            data = FolderPointCloud(tmp_path / 'data', cache_dir=where)
            fitted += len(data) == 6
        except OSError as error:
            assert all(text in str(error) for text in ('No space left on device', 'cache_dir=None', str(where)))
        assert len([f for f in where.glob('*') if f.is_dir()]) == (fitted > 0)
        filler.unlink()
    assert fitted


def test_a_line_that_does_not_fit_is_no_half_line(disk):
    path = disk / 'metrics.jsonl'
    append_line(path, 'x' * 100)
    filler = fill(disk)
    with pytest.raises(OSError, match=r'No space left on device: no line could be added: .*metrics\.jsonl'):
        append_line(path, 'y' * 2 * PAGE)
    filler.unlink()
    append_line(path, 'z')
    assert path.read_text() == 'x' * 100 + '\nz\n'


def run(folder: Path, full: tuple[int, int] | None = None, goes_on: bool = False, resume: bool = False) -> dict:
    """Train; the disk is full from one epoch to another. Gives the checkpoint at the end."""
    cfg = toy_config(folder, ewa=True, ema=True, epochs=4, resume=resume)
    cfg['default_hooks']['checkpoint'].update(max_keep_ckpts=1, save_best='OA')
    if goes_on:
        cfg['default_hooks']['checkpoint']['on_error'] = 'continue'
        cfg['default_hooks']['metrics'] = dict(type='MetricsHook', on_error='continue')
    runner = Runner.from_cfg(cfg)
    call, filler = runner.call_hook, []

    def filling(stage, **kwargs):
        if full and stage == 'after_train_epoch' and runner.epoch + 1 == full[0]:
            filler.append(fill(folder.parent))
        if filler and stage == 'before_train_epoch' and runner.epoch + 1 == full[1]:
            filler.pop().unlink()
        call(stage, **kwargs)

    runner.call_hook = filling
    runner.train()
    return read_checkpoint(folder / 'epoch_4.pth')


def lines(folder: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != 'time'}
            for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_a_run_on_a_full_disk_goes_on_or_stops_as_it_is_told(disk, tmp_path):
    whole = run(tmp_path / 'whole')
    found = run(disk / 'on', (2, 4), goes_on=True)
    assert same(found['state_dict'], whole['state_dict']) and lines(disk / 'on') == lines(tmp_path / 'whole')
    assert sorted(p.name for p in (disk / 'on').glob('epoch_*')) == ['epoch_4.pth']
    shutil.rmtree(disk / 'on')

    with pytest.raises(OSError, match='No space left on device'):
        run(disk / 'stops', (2, 4))
    (disk / 'filler').unlink()
    found = run(disk / 'stops', resume=True)
    assert same(found['state_dict'], whole['state_dict']) and same(found['optimizer'], whole['optimizer'])
    assert lines(disk / 'stops') == lines(tmp_path / 'whole')
