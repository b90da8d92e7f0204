"""No space, no permission, damaged files: a clear error, and what was there before is still there."""
import errno
import random

import pytest
import torch
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from faults import WRITERS, Fault, FaultyOS

from ewa3d import files
from ewa3d.engine import checkpoint, intact
from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
from ewa3d.engine.intact import find_intact_checkpoint
from ewa3d.engine.runner import Runner

STATE = dict(a=torch.arange(600.).view(20, 30), b=torch.ones(3))
CODES = [errno.ENOSPC, errno.EACCES]


@pytest.mark.parametrize('code', CODES)
@pytest.mark.parametrize('name', WRITERS)
def test_a_write_that_fails_anywhere(tmp_path, monkeypatch, name, code):
    folder, count, write = tmp_path / 'here', Fault(), WRITERS[name]
    path = write(folder / name, 1)
    before, there = path.read_bytes(), sorted(folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(files, 'os', FaultyOS(count))
        write(tmp_path / 'other' / name, 2)
    assert count.count >= 4
    for number in range(count.count):
        monkeypatch.setattr(files, 'os', FaultyOS(Fault(number, code)))
        with pytest.raises(OSError, match='is what it was before') as caught:
            write(folder / name, 2)
        assert caught.value.errno == code and str(path) in str(caught.value)
        assert path.read_bytes() == before and sorted(folder.iterdir()) == there
    print(f'\n{name}: {count.count} operations of writing it failed one by one ({errno.errorcode[code]}): the old one '
          'was intact')


@pytest.mark.parametrize('code', CODES)
def test_a_line_that_cannot_be_added_leaves_the_file_alone(tmp_path, monkeypatch, code):
    path = tmp_path / 'metrics.jsonl'
    files.append_line(path, 'one')
    count = Fault()
    monkeypatch.setattr(files, 'os', FaultyOS(count))
    files.append_line(path, 'two')
    for number in range(count.count):
        monkeypatch.setattr(files, 'os', FaultyOS(Fault(number, code)))
        with pytest.raises(OSError, match=r'metrics\.jsonl'):
            files.append_line(path, 'three' * 10)
        assert path.read_text() in ('one\ntwo\n', 'one\ntwo\n' + 'three' * 10 + '\n')  # the flush alone failed
        path.write_text('one\ntwo\n')


def test_half_a_line_is_cut_off(tmp_path):
    path = tmp_path / 'x.jsonl'
    for before, after in ((None, ''), ('', ''), ('{"a": 1', ''), ('one\ntw', 'one\n'), ('x' * 9000, ''),
                          ('one\n' + 'é' * 9000, 'one\n'), ('one\n', 'one\n')):
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_text(before)
        files.append_line(path, 'näxt')
        assert path.read_text() == after + 'näxt\n'


def test_leftovers_are_removed_and_nothing_else(tmp_path):
    for name in ('.epoch_1.pth.abc.tmp', 'epoch_1.pth', '.hidden', 'a.tmp'):
        (tmp_path / name).write_text('')
    files.remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.hidden', 'a.tmp', 'epoch_1.pth']


# ---- a run ----------------------------------------------------------------------------------------------------------
def failing_at(name: str):
    def write(path, content):
        if path.name == name:
            raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        return files.atomic_write(path, content)
    return write


def test_a_run_goes_on_without_a_checkpoint_where_that_is_asked_for(tmp_path, monkeypatch):
    cfg = toy_config(tmp_path, epochs=3)
    cfg['default_hooks']['checkpoint'].update(max_keep_ckpts=1, on_error='continue')
    monkeypatch.setattr(checkpoint, 'atomic_write', failing_at('epoch_2.pth'))
    Runner.from_cfg(cfg).train()
    assert [p.name for p in tmp_path.glob('epoch_*.pth')] == ['epoch_3.pth']
    assert 'No space left on device' in (log := (tmp_path / 'train.log').read_text()) and 'the run goes on' in log


def test_a_run_that_could_not_save_continues_from_the_checkpoint_before(tmp_path, monkeypatch):
    for name in 'ab':
        cfg = toy_config(tmp_path / name, ewa=True, epochs=2)
        cfg['default_hooks']['checkpoint'].update(max_keep_ckpts=1)
        if name == 'b':
            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, 'atomic_write', failing_at('epoch_2.pth'))
                with pytest.raises(OSError, match=r'epoch_2\.pth'):
                    Runner.from_cfg(cfg).train()
            assert find_intact_checkpoint(tmp_path / 'b').name == 'epoch_1.pth'
            cfg['resume'] = True
        Runner.from_cfg(cfg).train()
    a, b = (read_checkpoint(tmp_path / name / 'epoch_2.pth') for name in 'ab')
    assert same(a['state_dict'], b['state_dict']) and same(a['optimizer'], b['optimizer'])


def test_the_option_of_the_hook(tmp_path):
    cfg = toy_config(tmp_path)
    cfg['default_hooks']['checkpoint']['on_error'] = 'ignore'
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'continue', got 'ignore'"):
        Runner.from_cfg(cfg)


# ---- damage ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_damaged_checkpoint_is_found_out(tmp_path, suffix):
    """Cut at any length, bytes flipped: an error that names the file, or the very same content (padding)."""
    path = write_checkpoint(tmp_path / f'x.{suffix}', STATE, dict(epoch=1))
    whole, content, rng = path.read_bytes(), read_checkpoint(path), random.Random(0)
    damaged = [whole[:length] for length in range(0, len(whole), max(1, len(whole) // 60))] + [whole[:-1]]
    for _ in range(120):
        flipped = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for raw in damaged:
        path.write_bytes(raw)
        try:
            assert same(read_checkpoint(path), content)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 0.8 * len(damaged)
    print(f'\n{suffix}: {len(damaged)} damaged checkpoints, {refused} refused, the others read as they were written')


def test_the_newest_intact_checkpoint_is_used(tmp_path):
    run = tmp_path / 'run'
    for number in (1, 2, 3):
        write_checkpoint(run / f'epoch_{number}.pth', STATE, dict(epoch=number, iter=number), optimizer={})
    files.atomic_write(run / 'last_checkpoint', str(run / 'epoch_3.pth'))
    assert find_intact_checkpoint(run).name == 'epoch_3.pth'
    for number, left in ((3, 'epoch_2.pth'), (2, 'epoch_1.pth')):
        path = run / f'epoch_{number}.pth'
        path.write_bytes(path.read_bytes()[:-50])
        assert find_intact_checkpoint(run).name == left
        assert str(path) in intact.damage(path)
    write_checkpoint(run / 'epoch_1.pth', STATE, dict(epoch=1))
    with pytest.raises(ValueError, match=r'epoch_3\.pth .*; .* has no other checkpoint that a run could be'):
        find_intact_checkpoint(run)
    assert find_intact_checkpoint(tmp_path) is None


def test_a_checkpoint_of_a_newer_release_is_not_passed_over(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / 'epoch_1.pth', STATE, {}, optimizer={})
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, 'FORMAT_VERSION', 99)
        write_checkpoint(tmp_path / 'epoch_2.pth', STATE, {}, optimizer={})
    files.atomic_write(tmp_path / 'last_checkpoint', str(tmp_path / 'epoch_2.pth'))
    with pytest.raises(ValueError, match='newer release'):
        find_intact_checkpoint(tmp_path)


def test_a_run_resumes_from_the_intact_one_and_says_so(tmp_path):
    cfg = toy_config(tmp_path, epochs=2)
    whole = dict(Runner.from_cfg(cfg).train().state_dict())
    (tmp_path / 'epoch_2.pth').write_bytes((tmp_path / 'epoch_2.pth').read_bytes()[:-100])
    runner = Runner.from_cfg({**cfg, 'resume': True})
    runner.train()
    assert same(dict(runner.model.state_dict()), whole)
    log = (tmp_path / 'train.log').read_text()
    assert 'epoch_2.pth cannot be read' in log and 'epoch_1.pth, the newest intact one' in log


# ---- any byte -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', [
    name if name == 'metrics.json' else pytest.param(name, marks=pytest.mark.reliability) for name in WRITERS])
def test_a_file_that_may_not_grow_beyond_any_byte(tmp_path, name):
    """The system itself stops the write there, in the middle of whatever is being written."""
    resource = pytest.importorskip('resource')
    write = WRITERS[name]
    path = write(tmp_path / 'run' / name, 1)
    before, there = path.read_bytes(), sorted(path.parent.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    length = write(tmp_path / 'other' / name, 2).stat().st_size - 64 * name.endswith('.html')  # it names its folder
    sizes = range(0, length, max(1, length // (100 if name.endswith(('.html', '.png')) else 3000)))  # those are drawn
    for size in sizes:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(OSError, match='File too large: could not be written and is what it was before'):
                write(path, 2)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before and sorted(path.parent.iterdir()) == there
    assert write(path, 2).read_bytes() != before
    print(f'\n{name}: {length} bytes, writing it stopped at {len(sizes)} of them: the old one was intact')
