"""A data worker that dies, raises or hangs: the run ends with an error that names it, the sample and the cause."""
import multiprocessing
import os
import signal

import pytest
import torch
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from mmengine.registry import init_default_scope
from rank_toys import faulty_config

from ewa3d.cli import one_line
from ewa3d.datasets import SyntheticShapes
from ewa3d.datasets.mixed import Draw, MixedDataset
from ewa3d.engine.runner import Runner
from ewa3d.engine.workers import WorkerError


@pytest.mark.parametrize(('how', 'message'), [
    ('kill', r'was ended by SIGKILL \(the system ends processes so where memory runs out\)'),
    ('segfault', r'was ended by SIGSEGV \(where it was'), ('exit', 'ended with exit code 0'),
    ('hang', r'has not finished a batch for 10 s \(the timeout of its loader\)')])
def test_a_worker_that_is_gone_or_hangs(tmp_path, how, message, capfd):
    cfg = faulty_config(tmp_path, how, workers=2, loader_timeout=10 if how == 'hang' else 0)
    runner = Runner.from_cfg(cfg)
    with pytest.raises(WorkerError, match=message) as caught:
        runner.train()
    assert 'of FaultyClouds (pid' in str(caught.value) and str(caught.value).endswith(', at sample 5 (toy5.npy)')
    assert 'Error' not in one_line(caught.value)
    assert not multiprocessing.active_children()
    if how in ('segfault', 'hang'):  # where it was in the code
        assert 'in fail' in capfd.readouterr().err


@pytest.mark.parametrize('persistent', [True, False])
def test_a_worker_that_raises(tmp_path, persistent):
    cfg = faulty_config(tmp_path, 'raise', workers=2)
    cfg['train_dataloader']['persistent_workers'] = persistent
    runner = Runner.from_cfg(cfg)
    with pytest.raises(ValueError, match='this is the first cause') as caught:
        runner.train()
    assert one_line(caught.value) in [
        f'data worker {i}: ValueError: this is the first cause sample 5 (toy5.npy)' for i in range(2)]
    assert not multiprocessing.active_children()


def test_workers_leave_signals_to_the_process_that_started_them(tmp_path):
    """As those that a terminal or torchrun sends to all of them; and they are what they were without being watched."""
    runner = Runner.from_cfg(toy_config(tmp_path / 'a', workers=2, epochs=1))
    call = runner.call_hook

    def sending(stage, **kwargs):
        if stage == 'before_train_iter' and runner.iter == 1:
            for worker in runner.train_dataloader.workers:
                os.kill(worker.pid, signal.SIGTERM), os.kill(worker.pid, signal.SIGINT)
        call(stage, **kwargs)

    runner.call_hook = sending
    watched = runner.train().state_dict()
    plain = Runner.from_cfg(toy_config(tmp_path / 'b', epochs=1)).train().state_dict()
    assert same(dict(watched), dict(plain))


def test_a_loader_of_ones_own_is_left_alone(tmp_path):
    init_default_scope('ewa3d')
    cfg = toy_config(tmp_path, epochs=1)
    data = Runner.build_dataloader(cfg['train_dataloader']).dataset
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=1)
    assert Runner.build_dataloader(loader) is loader and type(loader) is torch.utils.data.DataLoader
    assert Runner.build_dataloader(dict(cfg['train_dataloader'], num_workers=1)).timeout == 1200


def test_names_of_samples():
    shapes = SyntheticShapes(num_samples=6, indices=[1, 4])
    assert shapes.name_of(1) == shapes[1]['name'] == shapes.name_of((1, 2))
    mixed = MixedDataset(dict(a=shapes, b=SyntheticShapes(num_samples=3)))
    assert mixed.name_of(3) == mixed.name_of(Draw(1, 1)) == f'b: {mixed.datasets[1].name_of(1)}'
