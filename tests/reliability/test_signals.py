"""SIGTERM and Ctrl-C: a checkpoint, a clean end, and a run that goes on as if nothing had been."""
import json
import os
import signal

import numpy as np
import pytest
from engine_toys import on_cpu, same, toy_config  # noqa: F401

from ewa3d.datasets import cache
from ewa3d.engine.checkpoint import find_last_checkpoint, read_checkpoint
from ewa3d.engine.interrupt import catch_signals
from ewa3d.engine.runner import Runner


def config(folder, **options) -> dict:
    cfg = toy_config(folder, ewa=True, ema=True, epochs=2, workers=1, **options)
    cfg['default_hooks']['checkpoint']['interval'] = 2
    return cfg


def send(cfg: dict, number: int, stage: str, iteration: int) -> None:
    """Train; the process gets a signal at a stage of the run."""
    runner = Runner.from_cfg(cfg)
    call, sent = runner.call_hook, []

    def sending(name, **kwargs):
        if name == stage and runner.iter == iteration and not sent:
            sent.append(os.kill(os.getpid(), number))
        call(name, **kwargs)

    runner.call_hook = sending
    runner.train()


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    Runner.from_cfg(config(folder)).train()
    return folder


@pytest.mark.parametrize(('number', 'stage', 'iteration', 'saved'), [
    (signal.SIGTERM, 'before_train_iter', 2, 3), (signal.SIGINT, 'before_train_iter', 9, 10),
    (signal.SIGTERM, 'before_train_iter', 5, 6), (signal.SIGINT, 'before_val_iter', 6, 6)])
def test_a_signal_saves_and_leaves(whole, tmp_path, number, stage, iteration, saved):
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as caught:
        send(config(tmp_path), number, stage, iteration)
    assert number == signal.SIGINT or caught.value.code == 0
    assert handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    path = find_last_checkpoint(tmp_path)
    assert path.name == 'interrupted.pth' and read_checkpoint(path)['meta']['iter'] == saved
    assert (f'{signal.Signals(number).name}: stopped after iteration {saved};'
            in (tmp_path / 'train.log').read_text())
    Runner.from_cfg(config(tmp_path, resume=True)).train()
    ours, theirs = (read_checkpoint(folder / 'epoch_2.pth') for folder in (tmp_path, whole))
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'rng'):
        assert same(ours[key], theirs[key]), key
    lines = [[{k: v for k, v in json.loads(line).items() if k != 'time'}
              for line in (folder / 'metrics.jsonl').read_text().splitlines()] for folder in (tmp_path, whole)]
    assert lines[0] == lines[1]
    assert not path.exists()  # a later checkpoint is complete


@pytest.mark.parametrize(('number', 'error'), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_while_the_data_are_prepared_ends_the_run_at_once(tmp_path, monkeypatch, number, error):
    """There is nothing to save yet, and to prepare data may take hours."""
    cfg = config(tmp_path / 'run')
    for name in 'abc':
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(4):
            np.save(tmp_path / 'data' / name / f'{i}.npy', np.random.default_rng(i).normal(size=(60, 3)))
    data = dict(type='FolderPointCloud', data_root=str(tmp_path / 'data'), cache_dir=str(tmp_path / 'cache'),
                pipeline=[dict(type='Resample', num_points=32), dict(type='Pack')])
    cfg['train_dataloader'].update(dataset=data, num_workers=0)
    ordered, given = cache.ordered, []

    def interrupted(*args):
        for cloud in ordered(*args):
            given.append(cloud)
            if len(given) == 2:
                os.kill(os.getpid(), number)
            yield cloud

    monkeypatch.setattr(cache, 'ordered', interrupted)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(error) as caught:
        runner.train()
    assert number == signal.SIGINT or caught.value.code == 143
    assert len(given) == 2 and [path.suffix for path in (tmp_path / 'cache').iterdir()] == ['.lock']


def test_the_second_signal_does_not_wait():
    with pytest.raises(KeyboardInterrupt), catch_signals() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught.number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert not caught.number and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
