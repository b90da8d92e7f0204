"""Whole training steps of a Point-MAE-size classifier: what EWA costs on top of the plain model."""
from collections.abc import Iterator

import torch

from ewa3d.bench.harness import Case, Settings

__all__ = ['cases']

FULL = dict(batch=32, points=1024, num_groups=64, group_size=32, dim=384, depth=12, heads=6, classes=40)
QUICK = dict(batch=4, points=64, num_groups=8, group_size=8, dim=16, depth=2, heads=2, classes=5)


def cases(settings: Settings) -> Iterator[Case]:
    """Plain, 4 experts in every second FFN, 4 experts in every FFN; averaging after each optimizer step included."""
    size = QUICK if settings.quick else FULL
    for dtype in settings.dtypes:
        name = (f'train step {size["depth"]} × {size["dim"]}, {size["num_groups"]} groups × {size["group_size"]}, '
                f'batch {size["batch"]}, {dtype}')
        yield Case(name, {'plain': _step(settings, size, dtype),
                          'EWA, every 2nd FFN': _step(settings, size, dtype, every=2),
                          'EWA, every FFN': _step(settings, size, dtype, every=1)})


def _step(settings: Settings, size: dict, dtype: str, every: int = 0):
    """A builder of one step: forward, loss, backward, AdamW, with ``every`` the averaging of the experts."""
    def build():
        from ewa3d import attach_ewa, expand
        from ewa3d.structures import Sample
        model = _model(size).to(settings.device)
        if every:
            expand(model, [dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=every, num_experts=4)])
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        if every:
            attach_ewa(optimizer, model, share_rate=0.3, schedule='constant', total_steps=1_000_000)
        points = torch.randn(size['batch'], size['points'], 3, device=settings.device)
        samples = [Sample(gt_label=torch.tensor(i % size['classes'], device=settings.device))
                   for i in range(size['batch'])]

        def step():
            with settings.autocast(dtype):
                losses = model(dict(points=points), samples, mode='loss')
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step
    return build


def _model(size: dict):
    from ewa3d.registry import MODELS
    tokenizer = dict(type='PointPatchEmbed', num_groups=size['num_groups'], group_size=size['group_size'],
                     embed_dim=size['dim'])
    backbone = dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=size['dim'], depth=size['depth'],
                    num_heads=size['heads'], drop_path_rate=0.1)
    return MODELS.build(dict(type='TaskModel', backbone=backbone, neck=dict(type='TokenPool'),
                             head=dict(type='ClsHead', num_classes=size['classes'], form='mlp')))
