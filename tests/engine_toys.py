"""A tiny data set and config for the engine's tests: seconds, one thread, nothing on disk."""
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from ewa3d.registry import DATASETS
from ewa3d.structures import Sample


@pytest.fixture(autouse=True, scope='module')
def on_cpu():
    """Bit-exactness is promised for the CPU; modules that import this run there, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.runner.runner.get_device', lambda: 'cpu')
        yield


CLASSES = ('flat', 'round', 'long')


@DATASETS.register_module(force=True)
class ToyClouds(Dataset):
    """Three kinds of noisy ellipsoids. Like ``PointDataset``, a sample is a function of (seed, epoch, index)."""

    def __init__(self, num_samples: int = 24, num_points: int = 48, split: str = 'train', seed: int = 0,
                 classes=CLASSES, lazy_init: bool = False):
        self.num_samples, self.num_points, self.split, self.seed = num_samples, num_points, split, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.metainfo = dict(classes=list(classes))

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict:
        epoch = int(self.epoch) if self.split == 'train' else 0
        rng = np.random.default_rng((self.seed, self.split == 'train', epoch, index))
        label = index % len(self.metainfo['classes'])
        shape = ((1, 1, 0.2), (1, 1, 1), (1, 0.3, 0.3))[label % 3]
        points = torch.tensor(rng.normal(size=(self.num_points, 3)) * shape, dtype=torch.float32)
        return dict(inputs=dict(points=points),
                    data_samples=Sample(gt_label=torch.tensor(label), metainfo=dict(index=index, name=f'toy{index}')))


def toy_config(work_dir, ewa: bool = False, ema: bool = False, epochs: int = 2, workers: int = 0, **options) -> dict:
    """A config as a dict; ``options`` replace whole top-level entries."""
    loader = dict(batch_size=4, num_workers=workers, persistent_workers=workers > 0)
    cfg = dict(
        default_scope='ewa3d', work_dir=str(work_dir), randomness=dict(seed=0),
        model=dict(type='TaskModel',
                   backbone=dict(type='TokenEncoder', embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.1,
                                 tokenizer=dict(type='PointPatchEmbed', num_groups=6, group_size=6, embed_dim=16,
                                                widths=(8, 8, 16), pos_dim=8)),
                   neck=dict(type='TokenPool'), head=dict(type='ClsHead', hidden=16)),
        train_dataloader=dict(**loader, drop_last=True, sampler=dict(type='DefaultSampler', shuffle=True),
                              dataset=dict(type='ToyClouds')),
        val_dataloader=dict(**loader, sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
                            dataset=dict(type='ToyClouds', num_samples=9, split='val')),
        test_dataloader=dict(**loader, sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
                             dataset=dict(type='ToyClouds', num_samples=9, split='test')),
        val_evaluator=dict(type='Accuracy'), test_evaluator=dict(type='Accuracy'), val_cfg=dict(), test_cfg=dict(),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
                           clip_grad=dict(max_norm=10)),
        param_scheduler=dict(type='WarmupCosineLR', warmup=0.1, eta_min=1e-6),
        train_cfg=dict(by_epoch=True, max_epochs=epochs, val_interval=1),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)))
    if ewa:
        cfg['model']['expand'] = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)]
        cfg['default_hooks']['ewa'] = dict(type='EWAHook', share_rate=0.3, schedule='linear')
    if ema:
        cfg['default_hooks']['ema'] = dict(type='EMAHook', momentum=0.1)
    cfg.update(options)
    return cfg


def write_config(path: Path, cfg: dict, modules=('engine_toys',)) -> Path:
    """``cfg`` as a config file that finds this module, or others."""
    cfg = dict(cfg, custom_imports=dict(imports=list(modules)))
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in cfg.items()) + '\n')
    return path


def same(one, other) -> bool:
    """Whether two trees of tensors and plain values are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other))
    return one == other
