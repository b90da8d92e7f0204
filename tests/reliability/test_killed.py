"""Killed anywhere, resumed, killed again: at the end the run without a stop, bit for bit, and its metrics."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from faults import in_a_process, train

from ewa3d.datasets import FolderPointCloud, cache
from ewa3d.engine.checkpoint import read_checkpoint

EPOCHS = 3
STATE = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'rng', 'message_hub')


def config(folder: Path, every_steps: bool = False) -> dict:
    cfg = toy_config(folder, ewa=True, ema=True, epochs=EPOCHS, resume=True)
    cfg['default_hooks']['checkpoint'].update(max_keep_ckpts=2, save_best='OA')
    if every_steps:  # checkpoints inside epochs as well
        cfg['custom_hooks'] = [dict(type='CheckpointHook', interval=4, by_epoch=False, max_keep_ckpts=1)]
    return cfg


def lines(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != 'time'} for line in found]


def survive(folder: Path, rng: random.Random, operations: int, kills: int, every_steps: bool = False) -> int:
    """Run to the end with so many kills on the way; how often it was killed."""
    killed = 0
    while True:
        at = rng.randrange(operations) if killed < kills else None
        alive, _ = in_a_process(lambda fault: train(config(folder, every_steps), fault), at, folder.parent / 'log.txt')
        if alive:  # to the end, before operation `at` or without one
            return killed
        killed += 1


def check(folder: Path, whole: Path) -> None:
    ours, theirs = (read_checkpoint(f / f'epoch_{EPOCHS}.pth') for f in (folder, whole))
    for key in STATE[:-1]:
        assert same(ours.get(key), theirs.get(key)), key
    assert lines(folder) == lines(whole)
    assert not list(folder.glob('.*.tmp'))
    assert len(list(folder.glob('best_*.pth'))) == 1


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> tuple[Path, int]:
    """The work dir of the run without a stop, and how many operations it has."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    alive, operations = in_a_process(lambda fault: train(config(folder), fault), None, folder.parent / 'log.txt')
    assert alive and [(x['mode'], x['epoch']) for x in lines(folder)] == [
        (mode, epoch) for epoch in range(1, EPOCHS + 1) for mode in ('train', 'val')]
    return folder, operations


def test_killed_twice(whole, tmp_path):
    assert survive(tmp_path / 'run', random.Random(1), whole[1], kills=2) <= 2
    check(tmp_path / 'run', whole[0])


@pytest.mark.reliability
def test_thirty_runs(whole, tmp_path):
    rng, killed = random.Random(0), 0
    for number in range(30):
        folder = tmp_path / str(number) / 'run'
        folder.parent.mkdir()
        killed += survive(folder, rng, whole[1], kills=3, every_steps=number % 2 == 1)
        check(folder, whole[0])
    print(f'\n30 runs, {killed} times killed at one of {whole[1]} operations: all equal the run without a stop, bit '
          'for bit; no line of metrics.jsonl lost or doubled')


def test_killed_while_a_cache_is_built(tmp_path, monkeypatch):
    """What is left is not taken for a cache, and is cleaned up."""
    for name in 'ab':
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i in range(4):
            np.save(tmp_path / 'data' / name / f'{i}.npy', np.random.default_rng(i).normal(size=(9, 3)))
    expected = FolderPointCloud(tmp_path / 'data', cache_dir=None)

    def build(fault):
        steps = cache.ordered
        monkeypatch.setattr(cache, 'ordered', lambda *args: (fault('cloud') or cloud for cloud in steps(*args)))
        monkeypatch.setattr(cache.np, 'save', lambda *args, save=np.save: fault('save') or save(*args))
        FolderPointCloud(tmp_path / 'data', cache_dir=tmp_path / 'cache')

    for at in (0, 5, 8):
        assert not in_a_process(build, at, tmp_path / 'log.txt')[0]
    assert len(list((tmp_path / 'cache').glob('.writing-*'))) == 1  # each start removes those before it
    data = FolderPointCloud(tmp_path / 'data', cache_dir=tmp_path / 'cache')
    assert all((data[i]['points'] == expected[i]['points']).all() for i in range(8))
    assert not list((tmp_path / 'cache').glob('.writing-*'))
