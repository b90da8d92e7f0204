"""A config that mixes images and clouds: seconds, one thread, nothing on disk."""
import numpy as np
import torch
from engine_toys import ToyClouds, on_cpu, toy_config

from ewa3d.registry import DATASETS
from ewa3d.structures import Sample

__all__ = ['ToyClouds', 'ToyImages', 'mixed_config', 'mixed_model', 'on_cpu']


@DATASETS.register_module(force=True)
class ToyImages(ToyClouds):
    """Stripes in two directions, or none; a sample is a function of (seed, epoch, index, repeat)."""

    def __init__(self, num_samples: int = 14, classes=('rows', 'columns', 'plain', 'noise'), **kwargs):
        super().__init__(num_samples=num_samples, classes=classes, **kwargs)

    def __getitem__(self, index: int) -> dict:
        return self.sample(index)

    def sample(self, index: int, repeat: int = 0) -> dict:
        epoch = int(self.epoch) if self.split == 'train' else 0
        rng = np.random.default_rng((self.seed, self.split == 'train', epoch, index, repeat))
        label = index % len(self.metainfo['classes'])
        stripes = np.tile(np.arange(8) % 2, (8, 1)) if label < 2 else np.zeros((8, 8))
        img = torch.tensor((stripes.T if label == 0 else stripes) + rng.normal(size=(8, 8)) * 0.1, dtype=torch.float32)
        return dict(inputs=dict(img=img[None]), data_samples=Sample(
            gt_label=torch.tensor(label), metainfo=dict(index=index, name=f'image{index}', repeat=repeat)))


def mixed_model(**backbone) -> dict:
    tokenizers = dict(
        points=dict(type='PointPatchEmbed', num_groups=6, group_size=6, widths=(8, 8, 16), pos_dim=8),
        img=dict(type='ImagePatchEmbed', img_size=8, patch_size=4, in_channels=1))
    head = dict(type='ClsHead', form='linear')
    return dict(type='TaskModel',
                backbone=dict(type='TokenEncoder', tokenizer=tokenizers, embed_dim=16, depth=2, num_heads=2,
                              pos='first', **backbone),
                tasks=dict(clouds=dict(modality='points', neck=dict(type='TokenPool'), head=dict(head)),
                           images=dict(modality='img', neck=dict(type='TokenPool', mode='cls'), head=dict(head),
                                       loss_weight=0.5)))


def mixed_config(work_dir, weights=None, epochs: int = 2, workers: int = 0, **options) -> dict:
    """Two epochs of clouds and images with EWA, evaluated by task."""
    cfg = toy_config(work_dir, ewa=True, epochs=epochs, workers=workers)
    cfg['model'] = dict(mixed_model(), expand=cfg['model']['expand'])

    def loader(split: str, num: int, **sampler) -> dict:
        sources = dict(clouds=dict(type='ToyClouds', num_samples=num, split=split),
                       images=dict(type='ToyImages', num_samples=num // 2, split=split))
        return dict(batch_size=4, num_workers=workers, persistent_workers=workers > 0,
                    dataset=dict(type='MixedDataset', sources=sources), sampler=dict(type='MixedSampler', **sampler),
                    batch_sampler=dict(type='MixedBatches'))

    cfg.update(train_dataloader=loader('train', 24, weights=weights), val_dataloader=loader('val', 9, shuffle=False),
               test_dataloader=loader('test', 9, shuffle=False), find_unused_parameters=True)
    cfg['val_evaluator'] = cfg['test_evaluator'] = dict(
        type='TaskMetrics', tasks=dict(clouds=dict(type='Accuracy'), images=dict(type='Accuracy')))
    cfg.update(options)
    return cfg
