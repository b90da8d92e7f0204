"""What a training step holds at its peak, by batch and points, with and without activation checkpointing."""
from collections.abc import Iterator

import torch

from ewa3d.bench.harness import Case, Settings
from ewa3d.bench.step import FULL, QUICK, classifier

__all__ = ['cases']

# batch, points, groups: the patches cover a cloud twice, as 64 × 32 of 1,024 points do
SHAPES = ((8, 1024, 64), (32, 1024, 64), (8, 4096, 256))
QUICK_SHAPES = ((2, 64, 8),)


def cases(settings: Settings) -> Iterator[Case]:
    """Forward and backward of the classifier, plain and with 4 experts in every second FFN."""
    size = QUICK if settings.quick else FULL
    for batch, points, groups in QUICK_SHAPES if settings.quick else SHAPES:
        for dtype in settings.dtypes:
            shape = {**size, 'batch': batch, 'points': points, 'num_groups': groups}
            yield Case(f'{size["depth"]} × {size["dim"]}, {batch}×{points} points, {groups} groups, {dtype}', {
                name: _step(settings, shape, dtype, every, checkpointing) for name, every, checkpointing in (
                    ('plain', 0, False), ('plain, checkpointing', 0, True), ('EWA, every 2nd FFN', 2, False),
                    ('EWA, every 2nd FFN, checkpointing', 2, True))}, memory=True)


def _step(settings: Settings, size: dict, dtype: str, every: int, checkpointing: bool):
    def build():
        from ewa3d import expand
        model = classifier(size, grad_checkpointing=checkpointing).to(settings.device).train()
        if every:
            expand(model, [dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=every, num_experts=4)])
        points = torch.randn(size['batch'], size['points'], 3, device=settings.device)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # what is held before a step does not count

        def step():
            with settings.autocast(dtype):
                loss = model(dict(points=points)).float().square().mean()
            loss.backward()
        return step
    return build
