"""Two ranks over gloo, one of which raises, dies or hangs: both end, and the first cause is told."""
import re
import signal

import pytest
from rank_toys import ended, faulty_config, start_by_hand, start_by_torchrun


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
