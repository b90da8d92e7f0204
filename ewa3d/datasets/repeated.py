"""Repeated augmentation: the same image several times in a row, augmented differently."""
from collections.abc import Iterator

import torch
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Dataset, Sampler

from ewa3d.checks import check_integer
from ewa3d.registry import SAMPLERS

__all__ = ['RepeatedSampler']


@SAMPLERS.register_module()
class RepeatedSampler(Sampler):
    """Samples in a random order, each ``repeats`` times (Hoffer et al. 2020; DeiT trains so, with three).

    An epoch keeps its length: it has a share ``1 / repeats`` of the data. The repetitions go to different processes
    where there are several, and each is augmented anew.

    Args:
        repeats: how often a sample comes in an epoch that has it, at least 1.
        dataset: one whose samples can be asked for as ``(index, repeat)``, as this package's can.
        seed: by default the run's.

    Raises:
        TypeError: another data set, or a number that is no integer. ValueError: ``repeats`` below 1, or fewer samples
            than processes.
    """

    def __init__(self, dataset: Dataset, repeats: int = 3, seed: int | None = None):
        if not hasattr(dataset, 'sample'):
            raise TypeError(f'RepeatedSampler: {type(dataset).__name__} has no method sample(index, repeat), so its '
                            'repetitions would all be augmented alike')
        self.dataset = dataset
        self.repeats = check_integer('RepeatedSampler: repeats', repeats, 1)
        self.seed = sync_random_seed() if seed is None else check_integer('RepeatedSampler: seed', seed, 0)
        self.rank, self.world_size = get_dist_info()
        self.epoch = 0
        if len(dataset) < self.world_size:
            raise ValueError(f'RepeatedSampler: {len(dataset)} samples are fewer than {self.world_size} processes')

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the Runner's hook calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        for place in range(self.rank, len(self) * self.world_size, self.world_size):
            yield order[place // self.repeats], place % self.repeats

    def __len__(self) -> int:
        return len(self.dataset) // self.world_size
