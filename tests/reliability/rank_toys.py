"""A data set and a hook that fail where they are told to, and two ranks to fail on."""
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from engine_toys import ToyClouds, toy_config, write_config
from mmengine.dist import get_rank
from mmengine.hooks import Hook

from ewa3d.registry import DATASETS, HOOKS

REPO = Path(__file__).resolve().parents[2]
LONG = 900  # seconds: far more than any of it takes, so that a test ends where something hangs after all


def fail(how: str) -> None:
    if how == 'raise':
        raise ValueError('this is the first cause')
    if how == 'hang':
        time.sleep(10 * LONG)
    if how == 'exit':
        os._exit(0)
    if how == 'kill':
        os.kill(os.getpid(), signal.SIGKILL)
    if how == 'segfault':
        ctypes.string_at(0)
    if how in ('SIGTERM', 'SIGINT'):  # as a terminal and torchrun send it: to the data workers, too
        os.killpg(0, signal.Signals[how])


@DATASETS.register_module(force=True)
class FaultyClouds(ToyClouds):
    """Toy clouds, of which reading the one of an index (-1: any) fails on one rank."""

    def __init__(self, how: str = '', at: int = 5, rank: int = 0, **kwargs):
        super().__init__(**kwargs)
        self.how, self.at, self.rank = how, at, rank

    def name_of(self, index: int) -> str:
        return f'toy{index}.npy'

    def __getitem__(self, index: int) -> dict:
        if self.at in (index, -1) and get_rank() == self.rank:
            fail(self.how)
        return super().__getitem__(index)


@HOOKS.register_module(force=True)
class FaultyHook(Hook):
    """Fails at an iteration of one rank."""

    def __init__(self, how: str = '', iteration: int = 1, rank: int = 1):
        self.how, self.iteration, self.rank = how, iteration, rank

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if runner.iter == self.iteration and get_rank() == self.rank:
            fail(self.how)


def faulty_config(folder, how: str = '', workers: int = 0, hook: dict | None = None, timeout: float = 600,
                  loader_timeout: float = 0, ewa: bool = False, resume: bool = False, **data) -> dict:
    cfg = toy_config(folder, ewa, workers=workers, resume=resume)
    cfg['train_dataloader'].update(dataset=dict(type='FaultyClouds', how=how, **data))
    if workers and loader_timeout:
        cfg['train_dataloader'].update(timeout=loader_timeout)
    cfg['env_cfg'] = dict(dist_cfg=dict(timeout=timeout))
    if hook:
        cfg['custom_hooks'] = [dict(type='FaultyHook', **hook)]
    return cfg


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def environment() -> dict:
    path = os.pathsep.join(map(str, (REPO, REPO / 'tests', REPO / 'tests' / 'reliability')))
    return dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')


def command(folder: Path, cfg: dict) -> list[str]:
    """``tools/train.py`` of a config on several ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder / 'config.py', cfg, ['rank_toys'])
    return [str(REPO / 'tools' / 'train.py'), str(config), '--launcher', 'pytorch']


def start_by_torchrun(folder: Path, cfg: dict) -> subprocess.Popen:
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', '2', '--master-port',
                str(free_port())]
    return subprocess.Popen([*launcher, *command(folder, cfg)], env=environment(), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def start_by_hand(folder: Path, cfg: dict) -> list[subprocess.Popen]:
    """Two ranks that nobody looks after, each with its workers in a process group of its own."""
    env = dict(environment(), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
    return [subprocess.Popen([sys.executable, *command(folder, cfg)], env=dict(env, RANK=str(i), LOCAL_RANK=str(i)),
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's & ignores it
            for i in range(2)]


def ended(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output, once it ended."""
    try:
        output = process.communicate(timeout=LONG)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f'{process.args} hangs: {process.communicate()[0][-3000:]}') from None
    return process.returncode, output
