"""Writes the fixtures of the current format version: ``python tests/formats/make.py``. Those of earlier versions stay
as the releases of their time wrote them; tests/test_formats.py reads them all."""
from collections import Counter
from pathlib import Path

import torch

from ewa3d.engine.checkpoint import FORMAT_VERSION, write_checkpoint

FOLDER = Path(__file__).parent


def content() -> dict:
    """What a checkpoint of a run with a model EMA, resumed inside an epoch, holds: something of every kind."""
    weights = {'backbone.blocks.0.mlp.fc1.weight': torch.arange(6.).view(2, 3) / 7,
               'backbone.norm.bias': torch.tensor([1., -2.]).bfloat16(), 'head.num_batches_tracked': torch.tensor(5),
               'mask': torch.tensor([True, False]), 'empty': torch.zeros(0, 2)}
    moments = dict(step=torch.tensor(8.), exp_avg=torch.arange(6.).view(2, 3), exp_avg_sq=torch.ones(2, 3))
    meta = dict(cfg=dict(model=dict(type='TaskModel', sizes=[1, 2.5, None, True, 'ü'])), epoch=1, iter=8, seed=3,
                dataset_meta=dict(classes=['flat', 'round']), versions=dict(torch='2.15.0'), metrics=dict(OA=50.),
                time='2026-01-01T00:00:00+0000', weights='ema', max_epochs=2, epoch_length=6, world_size=1)
    return dict(
        meta=meta, state_dict=weights,
        ema_state_dict={'steps': torch.tensor(8), **{f'module.{k}': v + v for k, v in weights.items()}},
        optimizer=dict(state={0: moments}, param_groups=[dict(lr=1e-3, betas=(0.9, 0.999), foreach=None, params=[0])]),
        param_schedulers=[dict(last_step=8, _last_value=[1e-3], milestones=Counter({3: 1}))],
        rng=[dict(python=[3, [1, 2, 3], None], torch=torch.arange(4, dtype=torch.uint8),
                  numpy=['MT19937', torch.arange(3), 7, 0, 0.0])],
        message_hub=dict(best_score=50.0, keep_ckpt_ids=[1], last_ckpt='epoch_1.pth'),
        gradients=[{'head.weight': torch.ones(2)}], epoch_scalars={'train/loss': [1.5, 1.25]})


def main() -> None:
    parts = content()
    write_checkpoint(FOLDER / f'v{FORMAT_VERSION}.pth', **parts)
    write_checkpoint(FOLDER / f'v{FORMAT_VERSION}.safetensors', parts['state_dict'], parts['meta'])


if __name__ == '__main__':
    main()
