"""Training: hooks, schedules, optimizer wrappers, checkpoints, the Runner. Importing it fills the registries."""
from ewa3d.engine import (
    averaging,
    boxes_hooks,
    checkpoint,
    display_hooks,
    dvae_hooks,
    hooks,
    optim,
    params,
    parts_hooks,
    pictures,
    pretrain_hooks,
    runner,
    schedules,
    validate,
)

__all__ = ['averaging', 'boxes_hooks', 'checkpoint', 'display_hooks', 'dvae_hooks', 'hooks', 'optim', 'params',
           'parts_hooks', 'pictures', 'pretrain_hooks', 'runner', 'schedules', 'validate']
