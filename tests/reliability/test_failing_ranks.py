"""Two ranks over gloo, one of which raises, dies or hangs: both end, and the first cause is told."""
import json
import re
import signal

import pytest
import torch.distributed as dist
from engine_toys import same, toy_config
from mmengine.registry import init_default_scope
from rank_toys import ended, faulty_config, start_by_hand, start_by_torchrun

from ewa3d.engine import ranks
from ewa3d.engine.checkpoint import find_last_checkpoint, read_checkpoint
from ewa3d.engine.ranks import PeerError, process_group_timeout, together
from ewa3d.engine.runner import Runner


# ---- what a rank makes of an error, in a group of one ---------------------------------------------------------------
@pytest.fixture
def store():
    store = dist.HashStore()
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()


def test_the_first_cause_is_kept(store, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / 'error.json'))
    for number in (1, 2):  # a run that fails says nothing about the next one
        with pytest.raises(ValueError, match=f'cause {number}'), together(new_run=True):
            raise ValueError(f'cause {number}')
        assert ranks._cause(store)['text'] == f'ValueError: cause {number}' and ranks._watch is None
        assert f'ValueError: cause {number}' in (tmp_path / 'error.json').read_text()  # which torchrun prints
    with pytest.raises(KeyError), together():
        raise KeyError('later')
    assert ranks._cause(store)['text'] == 'ValueError: cause 2'


@pytest.mark.parametrize(('error', 'own'), [
    (RuntimeError('[gloo/transport/tcp/pair.cc:534] Connection closed by peer'), False),
    (KeyError('something else'), True)])
def test_what_follows_from_the_failure_of_another(store, tmp_path, monkeypatch, error, own):
    monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(tmp_path / 'error.json'))
    with pytest.raises(PeerError, match='rank 3 failed first: ValueError: the cause') as caught, together(new_run=True):
        store.set(ranks._key('cause'), json.dumps(dict(rank=3, text='ValueError: the cause', traceback='its lines')))
        raise error
    assert caught.value.first_traceback == 'its lines' and not (tmp_path / 'error.json').exists()
    assert str(caught.value).endswith('; this one, too: KeyError: something else') == own


def test_a_collective_that_fails_without_a_reason(store):
    with pytest.raises(PeerError, match=r'the ranks lost one another: RuntimeError: .*Timed out'), \
            together(new_run=True):
        raise RuntimeError('[gloo] Timed out waiting 5000ms for recv operation')


def test_one_process_keeps_its_error():
    error = RuntimeError('gloo')
    with pytest.raises(RuntimeError) as caught, together():
        raise error
    assert caught.value is error


def test_the_timeout():
    assert process_group_timeout({}) == 1800 and process_group_timeout(dict(dist_cfg=dict(timeout=5))) == 5
    for wrong in (0, -1, float('inf')):
        with pytest.raises(ValueError, match=r'env_cfg\.dist_cfg\.timeout'):
            process_group_timeout(dict(dist_cfg=dict(timeout=wrong)))
    with pytest.raises(TypeError, match=r'env_cfg\.dist_cfg\.timeout'):
        process_group_timeout(dict(dist_cfg=dict(timeout='5')))


def test_a_data_set_that_is_too_small(monkeypatch, tmp_path):
    init_default_scope('ewa3d')
    loader = toy_config(tmp_path)['train_dataloader']
    monkeypatch.setattr('ewa3d.engine.runner.get_world_size', lambda: 25)
    with pytest.raises(ValueError, match='ToyClouds has 24 samples, which are fewer than the 25 processes'):
        Runner.build_dataloader(loader)
    monkeypatch.setattr('ewa3d.engine.runner.get_world_size', lambda: 2)
    with pytest.raises(ValueError, match='24 samples for 2 processes, which is less than one batch of 100'):
        Runner.build_dataloader(dict(loader, batch_size=100))


# ---- two of them ----------------------------------------------------------------------------------------------------
def failing(tmp_path, start, *args, **kwargs) -> list[tuple[int, str]]:
    started = start(tmp_path, faulty_config(tmp_path / 'run', *args, **kwargs))
    return [ended(process) for process in (started if isinstance(started, list) else [started])]


def test_a_rank_that_raises(tmp_path):
    """Rank 1 tells; rank 0 has one line that says why it ends; so has its log, with the traceback of rank 1."""
    (code, other), (first_code, first) = failing(tmp_path, start_by_hand, hook=dict(how='raise'))
    assert first_code == 2 and 'error: rank 1 of 2: this is the first cause' in first
    assert code == 4 and 'Traceback' not in other
    assert 'error: rank 0 of 2: rank 1 failed first: ValueError: this is the first cause' in other
    log = (tmp_path / 'run' / 'train.log').read_text()
    assert 'in before_train_iter' in log and 'ValueError: this is the first cause' in log and 'gloo' not in log


@pytest.mark.reliability
def test_a_rank_that_is_killed(tmp_path):
    (code, other), (first_code, _) = failing(tmp_path, start_by_hand, hook=dict(how='kill'))
    assert first_code == -signal.SIGKILL and code == 4
    assert re.search(r'error: rank 0 of 2: rank 1 \(\S+, pid \d+\) is gone: it was killed', other)


@pytest.mark.reliability
def test_a_rank_that_hangs(tmp_path):
    """It is named by the one that waited, and says itself where it was before it is ended."""
    (code, other), (hung_code, hung) = failing(tmp_path, start_by_hand, hook=dict(how='hang'), timeout=60)
    assert code == 4 and re.search(r'error: rank 0 of 2: rank 1 \(\S+, pid \d+\) did not answer within 60 s', other)
    assert hung_code == 4 and 'rank 1 is ended' in hung and 'in fail' in hung


@pytest.mark.parametrize('how', [
    'kill', *(pytest.param(how, marks=pytest.mark.reliability) for how in ('raise', 'hang'))])
def test_a_worker_of_a_rank_under_torchrun(tmp_path, how):
    (code, output), = failing(tmp_path, start_by_torchrun, how, workers=1, at=-1, rank=1,
                              loader_timeout=10 if how == 'hang' else 0)
    assert code != 0
    told = dict(kill=r' of FaultyClouds \(pid \d+\) was ended by SIGKILL',
                hang=r' of FaultyClouds \(pid \d+\) has not finished a batch for 10 s',
                **{'raise': r': ValueError: this is the first cause sample \d+ \(toy\d+\.npy\)'})
    assert re.search('error: rank 1 of 2: data worker 0' + told[how], output)
    summary = output.partition('Root Cause')[2]
    assert 'rank      : 1' in summary and ('first cause' in summary or 'WorkerError' in summary)


@pytest.mark.reliability
@pytest.mark.parametrize(('name', 'code'), [('SIGTERM', 0), ('SIGINT', 130)])
def test_a_signal_to_one_rank_and_its_workers(tmp_path, name, code):
    """All ranks finish the step, save and leave; what goes on from there is the run without a stop."""
    hook = dict(how=name, iteration=1)
    assert [c for c, _ in failing(tmp_path / 'a', start_by_hand, workers=1, hook=hook, ewa=True)] == [code, code]
    last = find_last_checkpoint(tmp_path / 'a' / 'run')
    assert last.name == 'interrupted.pth' and read_checkpoint(last)['meta']['iter'] == 2
    for folder, resume in (('a', True), ('b', False)):
        assert [c for c, _ in failing(tmp_path / folder, start_by_hand, workers=1, ewa=True, resume=resume)] == [0, 0]
    ours, theirs = (read_checkpoint(tmp_path / folder / 'run' / 'epoch_2.pth') for folder in 'ab')
    for key in ('state_dict', 'optimizer', 'rng'):
        assert same(ours[key], theirs[key]), key


@pytest.mark.reliability
def test_fewer_samples_than_ranks(tmp_path):
    """On all ranks alike, so that none waits for another."""
    for code, output in failing(tmp_path, start_by_hand, num_samples=1):
        assert code in (2, 4) and 'has 1 samples, which are fewer than the 2 processes' in output
