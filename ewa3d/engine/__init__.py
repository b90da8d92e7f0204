"""Training: hooks, schedules, optimizer wrappers, checkpoints, the Runner. Importing it fills the registries."""
from ewa3d.engine import (
    averaging,
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

__all__ = ['averaging', 'checkpoint', 'display_hooks', 'dvae_hooks', 'hooks', 'optim', 'params', 'parts_hooks',
           'pictures', 'pretrain_hooks', 'runner', 'schedules', 'validate']
