"""Same seed, same curve, bit for bit on the CPU, whatever the number of workers; another seed, another curve."""
import json
from pathlib import Path

import pytest
from engine_toys import on_cpu, same  # noqa: F401
from mmengine.config import Config

from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.derive import dataset_cfgs
from ewa3d.engine.runner import Runner

REPO = Path(__file__).resolve().parents[2]
QUICK = ['quickstart/ewa']
CONFIGS = [  # of every family; what draws the most numbers of it
    'quickstart/plain', 'point_mae/point-mae_xs_scratch_modelnet10-1k_ewa-ema',
    'point_mae/point-mae_xs_pt_modelnet10_ewa', 'point_mae/point-mae_xs_scratch_scanobjectnn-objbg',
    'point_bert/dvae_xs_modelnet10',
    'point_bert/point-bert_xs_scratch_modelnet10-1k', 'part_seg/point-mae_xs_scratch_synthetic_ewa',
    'part_seg/point-mae_xs_scratch_cattle_ewa', 'detection/3detr_xs_scratch_synthetic_ewa',
    'detection/3detr_xs_scratch_scannet23', 'vit/vit_xs_scratch_digits_ewa-ema', 'vit/vit_xs_scratch_cifar10_moe-ewa',
    'mixed/joint_xs_scratch_cifar10-modelnet10_ewa', 'relatives/point-mae_xs_scratch_modelnet10-1k_moe-early-ewa',
    'relatives/point-mae_xs_scratch_modelnet10-1k_exfusion', 'relatives/point-mae_xs_scratch_modelnet10-1k_repa50-ewa',
    'relatives/point-mae_xs_scratch_modelnet10-1k_rmoe', 'relatives/point-mae_xs_scratch_modelnet10-1k_s4d',
    'video/video-vit_xs_scratch_moving-shapes_stdha', 'video/zeroi2v_xs_ft_moving-shapes']
SAMPLES, BATCH, EPOCHS = 8, 4, 2


def small(name: str, folder: Path, workers: int, seed: int) -> Config:
    """A config with all its parts, for two epochs of two batches."""
    cfg = Config.fromfile(REPO / 'configs' / f'{name}.py')
    cfg.work_dir, cfg.randomness = str(folder), dict(seed=seed)
    cfg.train_cfg.update(max_epochs=EPOCHS, val_interval=EPOCHS)
    for hook in (cfg.get('default_hooks') or {}).values():
        if 'interval' in (hook or {}) and hook['type'] != 'LoggerHook':
            hook['interval'] = EPOCHS
    cfg.default_hooks.checkpoint.pop('save_best', None)
    for key, value in list(cfg.default_hooks.items()):
        if value and value['type'] == 'LinearSVMHook':  # reads all of its training data
            cfg.default_hooks[key] = None
    if 'pretrained' in cfg.model:
        cfg.model.pretrained = None
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0)
        if 'batch_sizes' in (loader.get('batch_sampler') or {}):
            loader['batch_sampler'].pop('batch_sizes')
        for dataset in dataset_cfgs(loader):
            if 'num_samples' in dataset:
                dataset['num_samples'] = SAMPLES
            elif 'pipeline' in dataset:
                dataset['indices'] = SAMPLES
            if 'data_root' in dataset:
                dataset['data_root'] = str(REPO / dataset['data_root'])
    return cfg


def run(name: str, folder: Path, workers: int = 0, seed: int = 0) -> tuple[list, dict]:
    """The curve of a run, and its last checkpoint."""
    Runner.from_cfg(small(name, folder, workers, seed)).train()
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return [{k: repr(v) for k, v in line.items() if k != 'time'} for line in lines], \
        read_checkpoint(folder / f'epoch_{EPOCHS}.pth')


def check(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(REPO)
    try:
        curve, checkpoint = run(name, tmp_path / 'one')
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert len(curve) > EPOCHS and any('loss' in line for line in curve)
    again, other = run(name, tmp_path / 'two', workers=2)
    assert again == curve
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'rng'):
        assert same(checkpoint.get(key), other.get(key)), key
    assert checkpoint['meta']['data'] == other['meta']['data']
    third, _ = run(name, tmp_path / 'three', seed=1)
    assert [line.get('loss') for line in third] != [line.get('loss') for line in curve]


@pytest.mark.parametrize('name', QUICK)
def test_quick(name, tmp_path, monkeypatch):
    check(name, tmp_path, monkeypatch)


@pytest.mark.reliability
@pytest.mark.parametrize('name', CONFIGS)
def test_every_family(name, tmp_path, monkeypatch):
    check(name, tmp_path, monkeypatch)
    print(f'\n{name}: 0 and 2 workers give the same curve and weights, bit for bit; another seed another')
