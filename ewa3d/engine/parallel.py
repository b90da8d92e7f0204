"""What a run of several processes needs beside DDP: the learning rate, synchronised batch norm, means over ranks."""
import math
from collections.abc import Mapping

from mmengine.dist import all_gather_object
from mmengine.optim import OptimWrapperDict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

__all__ = ['RULES', 'batch_size_of', 'check_sync_bn', 'lr_ratio', 'mean_over_ranks', 'scale_rates']

RULES = {'linear': float, 'sqrt': math.sqrt}
_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def lr_ratio(batch_size: int, base_batch_size: int, rule: str = 'linear') -> float:
    """What the learning rate for batches of ``base_batch_size`` is multiplied by for batches of ``batch_size``: their
    ratio (Goyal et al. 2017), or its square root, which suits Adam better (Malladi et al. 2022)."""
    return RULES[rule](batch_size / base_batch_size)


def batch_size_of(loader: DataLoader) -> int:
    """How many samples a batch of one rank has.

    Raises:
        ValueError: nobody can tell, or batches of several sources have different sizes.
    """
    sampler = loader.batch_sampler
    sizes = getattr(sampler, 'sizes', None) or [getattr(sampler, 'batch_size', None)]
    if None in sizes or len(set(sizes)) > 1:
        raise ValueError(f'auto_scale_lr needs batches of one size, and those of {type(sampler).__name__} have '
                         f'{" and ".join(map(str, sizes))}: leave it out and set the learning rate itself')
    return sizes[0]


def scale_rates(optim_wrapper, ratio: float) -> None:
    """Multiply the learning rate of every group of an optimizer, or of several."""
    wrappers = optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]
    for wrapper in wrappers:
        for group in wrapper.optimizer.param_groups:
            group['lr'] = group['lr'] * ratio  # not in place: groups may share a tensor


def check_sync_bn(model: nn.Module, on_gpu: bool) -> None:
    """Raise ``ValueError`` where batch norms cannot be synchronised in training."""
    if not on_gpu:
        raise ValueError("sync_bn='torch': torch's SyncBatchNorm trains on GPUs only, and there is none; without it "
                         "statistics are each rank's own, and averaged over the ranks at the end of an epoch")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module) not in _CONVERTED:
            raise ValueError(f"sync_bn='torch' would replace {name!r}, a {type(module).__name__}, by a batch norm of "
                             'another layout; leave sync_bn out for this model')


def mean_over_ranks(values: Mapping[str, float | list[float]]) -> dict:
    """The mean of each number, or of each place of a list of numbers, over the ranks that have it."""
    ranks = all_gather_object(dict(values))
    found = {}
    for key in dict.fromkeys(key for rank in ranks for key in rank):
        column = [rank[key] for rank in ranks if key in rank]
        found[key] = list(map(_mean, zip(*column))) if isinstance(column[0], list) else _mean(column)
    return found


def _mean(values) -> float:
    return sum(values) / len(values)
