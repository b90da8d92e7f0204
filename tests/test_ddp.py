"""Two ranks over gloo on the CPU, through the Runner and through the command line."""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_toys import same, toy_config, write_config

from ewa3d.engine.checkpoint import read_checkpoint

REPO = Path(__file__).resolve().parents[1]

# What each rank runs: train, write its own copy of the weights, then the same again from the first epoch's checkpoint.
RANK = """
import sys, torch
from mmengine.config import Config
from ewa3d.engine.runner import Runner
torch.set_num_threads(1)
for name in ('whole', 'resumed'):
    cfg = Config.fromfile(sys.argv[1])
    cfg.launcher = 'pytorch'
    if name == 'resumed':
        torch.manual_seed(123)
        cfg.resume, cfg.work_dir = f'{cfg.work_dir}/epoch_1.pth', f'{cfg.work_dir}_resumed'
    runner = Runner.from_cfg(cfg)
    runner.train()
    torch.save(dict(state=runner.model.module.state_dict(), rng=torch.get_rng_state(), metrics=runner.last_metrics),
               f'{cfg.work_dir}/rank{runner.rank}.pt')
torch.distributed.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def two_ranks(*command: str) -> list[subprocess.CompletedProcess]:
    env = dict(os.environ, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), OMP_NUM_THREADS='1',
               PYTHONPATH=os.pathsep.join([str(REPO), str(REPO / 'tests')]), CUDA_VISIBLE_DEVICES='')
    ranks = [subprocess.Popen([sys.executable, *command], env=dict(env, RANK=str(i), LOCAL_RANK=str(i)), text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
    try:
        outputs = [rank.communicate(timeout=3600)[0] for rank in ranks]  # a busy machine is no failure
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs):
        assert rank.returncode == 0, output[-3000:]
    return outputs


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The work dir of a two-rank run with EWA, and what the ranks have after it and after its resumed twin."""
    folder = tmp_path_factory.mktemp('ddp') / 'run'
    cfg = toy_config(folder, ewa=True, epochs=2)
    cfg['optim_wrapper']['accumulative_counts'] = 2  # three iterations a rank and epoch: a step crosses the boundary
    two_ranks('-c', RANK, str(write_config(folder.parent / 'config.py', cfg)))
    return folder, *([torch.load(Path(f'{folder}{name}') / f'rank{i}.pt', weights_only=True) for i in range(2)]
                     for name in ('', '_resumed'))


def test_experts_stay_equal_across_ranks(runs):
    one, other = runs[1]
    stacked = [key for key in one['state'] if '.mlp.' in key]
    assert stacked
    assert same(one['state'], other['state'])  # bit for bit: weights, and BatchNorm's statistics, which are averaged
    for key in stacked:
        assert float((one['state'][key] - one['state'][key].mean(0)).abs().max()) > 0  # and did not just collapse


def test_ranks_draw_different_partitions_but_agree_on_metrics(runs):
    folder, (one, other), _ = runs
    assert not same(one['rng'], other['rng'])  # the generator that partitions, dropout and drop path draw from
    for kind in ('python', 'numpy', 'torch'):
        first, second = (state[kind] for state in read_checkpoint(folder / 'epoch_1.pth')['rng'])
        assert not same(first, second), kind
    assert one['metrics'] == other['metrics'] and 0 <= one['metrics']['OA'] <= 100  # nine samples on two ranks
    assert len((folder / 'metrics.jsonl').read_text().splitlines()) == 4  # one process writes
    assert json.loads((folder / 'environment.json').read_text())['world_size'] == 2


def test_resume_is_exact_on_both_ranks(runs):
    folder, whole, resumed = runs
    checkpoint = read_checkpoint(folder / 'epoch_1.pth')
    assert len(checkpoint['rng']) == 2 and len(checkpoint['gradients']) == 2
    for one, other in zip(whole, resumed):
        assert same(one['state'], other['state']) and same(one['rng'], other['rng'])


def test_command_line(tmp_path):
    cfg = toy_config(tmp_path / 'run', epochs=1)
    del cfg['work_dir']
    config = write_config(tmp_path / 'config.py', cfg)
    two_ranks(str(REPO / 'tools' / 'train.py'), str(config), '--launcher', 'pytorch', '--work-dir',
              str(tmp_path / 'run'))
    assert read_checkpoint(tmp_path / 'run' / 'epoch_1.pth')['meta']['world_size'] == 2
