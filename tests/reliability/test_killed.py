"""Killed anywhere, resumed, killed again: at the end the run without a stop, bit for bit, and its metrics."""
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engine_toys import on_cpu, same, toy_config, write_config  # noqa: F401
from killing import STAGES, Watch, attempt, draw

from ewa3d.datasets import cache
from ewa3d.engine.checkpoint import read_checkpoint

EPOCHS = 3
STATE = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'rng')
KINDS = ('cache', 'step', 'validation', 'checkpoint', 'metrics', 'time', 'time')
SPLITS = dict(train=5, val=3)


@pytest.fixture(scope='module')
def clouds(tmp_path_factory) -> Path:
    """``train`` and ``val`` with three classes of a few clouds."""
    root = tmp_path_factory.mktemp('clouds')
    for split, size in SPLITS.items():
        for label, name in enumerate('abc'):
            (root / split / name).mkdir(parents=True)
            for i in range(size):
                rng = np.random.default_rng((len(split), label, i))
                np.save(root / split / name / f'{i}.npy', rng.normal(size=(60 + i, 3)) * (1, 1, label + 1))
    return root


def command(folder: Path, clouds: Path, every_steps: bool = False, workers: int = 0) -> list[str]:
    """``ewa3d train`` on a config in ``folder``: EWA, EMA, augmentation, caches, a validation after every epoch."""
    folder.mkdir(parents=True, exist_ok=True)
    cfg = toy_config(folder / 'run', ewa=True, ema=True, epochs=EPOCHS, workers=workers)
    cfg['default_hooks']['checkpoint'].update(max_keep_ckpts=2, save_best='OA')
    pipeline = [dict(type='Normalize'), dict(type='Resample', num_points=48, method='random'),
                dict(type='RandomScale', scale=(2 / 3, 3 / 2)), dict(type='Pack')]
    for split in SPLITS:
        cfg[f'{split}_dataloader']['dataset'] = dict(
            type='FolderPointCloud', data_root=str(clouds), split=split, cache_dir=str(folder / 'cache'),
            pipeline=pipeline)
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        del cfg[key]
    if every_steps:  # checkpoints inside epochs as well
        cfg['custom_hooks'] = [dict(type='CheckpointHook', interval=2, by_epoch=False, max_keep_ckpts=1)]
    return ['train', str(write_config(folder / 'config.py', cfg)), '--resume', 'auto']


def lines(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / 'run' / 'metrics.jsonl').read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != 'time'} for line in found]


def check(folder: Path, whole: Path) -> None:
    """Weights, training state, metrics and caches are those of the run without a stop; nothing else lies around."""
    ours, theirs = (read_checkpoint(f / 'run' / f'epoch_{EPOCHS}.pth') for f in (folder, whole))
    for key in STATE:
        assert same(ours.get(key), theirs.get(key)), key
    assert lines(folder) == lines(whole)
    assert not list((folder / 'run').glob('.*.tmp'))
    assert [p.name for p in sorted((folder / 'run').glob('epoch_*'))] == ['epoch_2.pth', 'epoch_3.pth']
    assert len(list((folder / 'run').glob('iter_*'))) <= 1
    assert len(list((folder / 'run').glob('best_*.pth'))) == 1
    caches = [{f.relative_to(root): f.read_bytes() for f in root.glob('*/*')} for root in
              (folder / 'cache', whole / 'cache')]
    assert caches[0] == caches[1] and len(caches[0]) == 3 * len(SPLITS)


def survive(argv: list[str], rng: random.Random, kinds, whole: SimpleNamespace) -> list[tuple[str, str]]:
    """Run to the end with a kill of each kind on the way; what was meant and what was hit."""
    hits, log = [], Path(argv[1]).with_name('log.txt')
    for kind in kinds:
        watch, after = draw(rng, kind, whole)
        found = attempt(argv, watch, log, after)
        if found.alive:  # to the end, before that moment
            break
        hits.append((kind, found.where))
    else:
        assert attempt(argv, Watch(), log).alive
    return hits


@pytest.fixture(scope='module')
def whole(tmp_path_factory, clouds) -> SimpleNamespace:
    """The run without a stop: its folder, how long it took, how many events each stage has."""
    folder = tmp_path_factory.mktemp('whole')
    found = attempt(command(folder, clouds), Watch(), folder / 'log.txt')
    assert found.alive and [(x['mode'], x['epoch']) for x in lines(folder)] == [
        (mode, epoch) for epoch in range(1, EPOCHS + 1) for mode in ('train', 'val')]
    return SimpleNamespace(folder=folder, seconds=found.seconds, counts=found.counts)


def test_killed_in_every_stage(whole, clouds, tmp_path):
    hits = survive(command(tmp_path, clouds, every_steps=True), random.Random(1), KINDS[:4], whole)
    assert hits == [(kind, kind) for kind in KINDS[:4]]
    check(tmp_path, whole.folder)


@pytest.mark.reliability
def test_thirty_runs(whole, clouds, tmp_path):
    """Each is killed in two to four places, some at times that the process knows nothing of."""
    rng, hits = random.Random(0), []
    for number in range(30):
        folder = tmp_path / str(number)
        kinds = rng.sample(KINDS, rng.randint(2, 4))
        kinds = sorted(kinds, key=lambda kind: kind != 'cache')  # a cache is built once
        argv = command(folder, clouds, every_steps=number % 2 == 1, workers=2 * (number % 10 == 9))
        hits += survive(argv, rng, kinds, whole)
        check(folder, whole.folder)
    table = Counter(where for _, where in hits)
    at_a_time = Counter(where for kind, where in hits if kind == 'time')
    print(f'\n30 runs of {EPOCHS} epochs, SIGKILL {len(hits)} times; where it hit, and of those at a time that was '
          'drawn blindly:')
    for stage in STAGES:
        print(f'  {stage:<12}{table[stage]:>5}{at_a_time[stage]:>5}')
    print('all equal the run without a stop, bit for bit; no line of metrics.jsonl lost or doubled')
    assert all(table[stage] >= 5 for stage in STAGES if stage != 'elsewhere')  # times go by the clock: any number


def test_killed_at_each_operation_of_building_a_cache(tmp_path, clouds):
    """What is left is not taken for a cache, and is cleaned up."""
    argv = ['data', 'convert', str(command(tmp_path, clouds)[1]), '--split', 'train']
    log, folder = tmp_path / 'log.txt', tmp_path / 'cache'
    events = attempt(argv, counted := Watch(), log).counts['cache']
    assert counted.now == 'elsewhere'
    expected = {f.name: f.read_bytes() for f in folder.glob('*/*')}
    for number in range(0, events, 4):
        for path in folder.glob('*/*'):
            path.unlink()
        found = attempt(argv, Watch('cache', number, number / events), log)
        assert found.where == 'cache'
        left = list(folder.glob(f'{cache.WRITING}*'))
        assert len(left) <= 1  # each start removes those before it
    assert attempt(argv, Watch(), log).alive
    assert {f.name: f.read_bytes() for f in folder.glob('*/*')} == expected
    assert not list(folder.glob(f'{cache.WRITING}*'))
