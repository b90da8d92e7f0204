"""Training: hooks, schedules, optimizer wrappers, checkpoints, the Runner. Importing it fills the registries."""
from ewa3d.engine import (
    averaging,
    boxes_hooks,
    checkpoint,
    display_hooks,
    dvae_hooks,
    finite,
    hooks,
    interrupt,
    optim,
    params,
    parts_hooks,
    pictures,
    pretrain_hooks,
    provenance,
    runner,
    saving,
    schedules,
    validate,
)

__all__ = ['averaging', 'boxes_hooks', 'checkpoint', 'display_hooks', 'dvae_hooks', 'finite', 'hooks', 'interrupt',
           'optim', 'params', 'parts_hooks', 'pictures', 'pretrain_hooks', 'provenance', 'runner', 'saving',
           'schedules', 'validate']
