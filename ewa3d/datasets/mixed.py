"""Several data sets as one, and the sampler that draws batches of one of them at a time."""
import inspect
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import BatchSampler, Dataset, Sampler

from ewa3d.checks import check_integer, check_number
from ewa3d.registry import DATASETS, SAMPLERS, nearest

__all__ = ['Draw', 'MixedBatches', 'MixedDataset', 'MixedSampler', 'apportion', 'keywords_of']


class Draw(NamedTuple):
    """A sample as :class:`MixedSampler` draws it: which source, which of its samples, and the how many-eth time in this
    epoch (from 0)."""
    source: int
    index: int
    repeat: int = 0


@DATASETS.register_module()
class MixedDataset(Dataset):
    """Data sets with names, behind one another: ``sources=dict(cifar10=dict(type='CIFAR10', …), modelnet10=dict(…))``.

    A sample's metainfo has its ``source``; the tasks of a model say from which source they learn. The metainfo has that
    of every source, ``metainfo['sources'][name]``.

    Args:
        sources: configs of data sets, or data sets, by name.
        lazy_init: leave the reading to the first use, where a source can.

    Raises:
        TypeError: ``sources`` is no dict. ValueError: it is empty.
    """

    def __init__(self, sources: Mapping, lazy_init: bool = False):
        if not isinstance(sources, Mapping) or 'type' in sources:
            raise TypeError(f'MixedDataset: sources is a dict of data sets by name, got {sources!r}')
        if not sources:
            raise ValueError('MixedDataset: sources is empty; at least one data set was expected')
        self.names = tuple(sources)
        self.datasets = [_build(source, lazy_init) for source in sources.values()]

    @property
    def metainfo(self) -> dict:
        """``sources``: name → metainfo of that data set."""
        return dict(sources={name: dict(getattr(dataset, 'metainfo', None) or {})
                             for name, dataset in zip(self.names, self.datasets)})

    @property
    def split(self) -> str | None:
        """The split, where it is that of all sources."""
        splits = {getattr(dataset, 'split', None) for dataset in self.datasets}
        return splits.pop() if len(splits) == 1 else None

    @property
    def sizes(self) -> list[int]:
        """How many samples each source has."""
        return [len(dataset) for dataset in self.datasets]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, i: int | Draw) -> dict:
        """Sample ``i``, counted through the sources in their order, or a :class:`Draw`."""
        draw = i if isinstance(i, tuple) else self._located(i)
        dataset = self.datasets[draw[0]]
        repeated = draw[2] and hasattr(dataset, 'sample')
        item = dataset.sample(draw[1], draw[2]) if repeated else dataset[draw[1]]
        item['data_samples'].set_metainfo(dict(source=self.names[draw[0]]))
        return item

    def name_of(self, i: int | Draw) -> str:
        """What sample ``i`` is called, with its source, without reading it."""
        draw = i if isinstance(i, tuple) else self._located(i)
        return f'{self.names[draw[0]]}: {self.datasets[draw[0]].name_of(draw[1])}'

    def _located(self, i: int) -> Draw:
        if not 0 <= i < len(self):
            raise IndexError(f'sample {i} of {len(self)}')
        for source, size in enumerate(self.sizes):
            if i < size:
                return Draw(source, i)
            i -= size
        raise IndexError(i)

    def __repr__(self) -> str:
        return f'MixedDataset({", ".join(f"{name}={data!r}" for name, data in zip(self.names, self.datasets))})'


def _build(source, lazy_init: bool) -> Dataset:
    if not isinstance(source, Mapping):
        return source
    cls = DATASETS.get(source['type']) if isinstance(source.get('type'), str) else source.get('type')
    lazy = lazy_init and cls is not None and 'lazy_init' in keywords_of(cls)
    return DATASETS.build({**source, 'lazy_init': True} if lazy else dict(source))


def keywords_of(cls: type) -> set[str]:
    """The keywords of a constructor and of those it passes ``**kwargs`` to."""
    return {name for base in cls.__mro__ if '__init__' in vars(base) for name in inspect.signature(base).parameters}


@SAMPLERS.register_module()
class MixedSampler(Sampler):
    """Which source each batch of an epoch is of, and which samples are in it; the batches are made by
    :class:`MixedBatches`.

    In training, every source is gone through at least once an epoch, in a new order each time; the shares of the
    batches are those of ``weights``, up to one batch, in a random sequence. A source that is drawn for longer starts
    over; what it repeats within an epoch is augmented anew. Everything is a function of ``(seed, epoch)``, so a run can
    stop anywhere, and all processes of a distributed run draw the same source at the same time: their models use the
    same parameters.

    Args:
        dataset: a :class:`MixedDataset`.
        weights: source → relative number of batches. By default each source is gone through exactly once: as many steps
            as training on it alone would take.
        shuffle: ``False`` for evaluation: every sample once, source by source.
        seed: by default the run's.

    Raises:
        TypeError: the data set is no ``MixedDataset``. ValueError: ``weights`` names other sources, or are not above 0.
    """

    def __init__(self, dataset: MixedDataset, weights: Mapping[str, float] | None = None, shuffle: bool = True,
                 seed: int | None = None):
        if not isinstance(dataset, MixedDataset):
            raise TypeError(f'MixedSampler: a MixedDataset was expected, got {type(dataset).__name__}')
        for name in weights or ():
            if name not in dataset.names:
                raise ValueError(f'MixedSampler: weights has no source {name!r}; {nearest(name, dataset.names)}')
            check_number(f'MixedSampler: weights.{name}', weights[name], '(0, inf)')
        missing = [name for name in dataset.names if weights is not None and name not in weights]
        if missing:
            raise ValueError(f'MixedSampler: weights lacks {", ".join(missing)}; a number above 0 was expected for '
                             'each source')
        self.dataset = dataset
        self.weights = None if weights is None else [float(weights[name]) for name in dataset.names]
        self.shuffle = bool(shuffle)
        self.seed = sync_random_seed() if seed is None else check_integer('MixedSampler: seed', seed, 0)
        self.rank, self.world_size = get_dist_info()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose what is drawn; the Runner's hook calls this before each epoch."""
        self.epoch = epoch

    def counts(self, batch_sizes: list[int]) -> list[int]:
        """How many batches of each source an epoch has (in evaluation, on this rank)."""
        sizes = self.dataset.sizes
        if not self.shuffle:
            return [-(-len(range(self.rank, size, self.world_size)) // batch)
                    for size, batch in zip(sizes, batch_sizes)]
        once = [-(-size // (batch * self.world_size)) for size, batch in zip(sizes, batch_sizes)]
        return once if self.weights is None else apportion(once, self.weights)

    def batches(self, batch_sizes: list[int]) -> Iterator[list[Draw]]:
        """The batches of this rank in this epoch."""
        counts = self.counts(batch_sizes)
        if not self.shuffle:
            yield from self._in_order(batch_sizes)
            return
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
        streams = [self._stream(source, count, batch_sizes[source]) for source, count in enumerate(counts)]
        for source in order:
            yield next(streams[source])

    def _stream(self, source: int, count: int, batch: int) -> Iterator[list[Draw]]:
        size = self.dataset.sizes[source]
        orders: list[list[int]] = []
        for number in range(count):
            start = (number * self.world_size + self.rank) * batch
            places = range(start, start + batch)
            while len(orders) * size <= places[-1]:  # one more time through the source
                rng = np.random.default_rng((self.seed, self.epoch, source, len(orders)))
                orders.append(rng.permutation(size).tolist())
            yield [Draw(source, orders[place // size][place % size], place // size) for place in places]

    def _in_order(self, batch_sizes: list[int]) -> Iterator[list[Draw]]:
        for source, (size, batch) in enumerate(zip(self.dataset.sizes, batch_sizes)):
            mine = range(self.rank, size, self.world_size)
            for start in range(0, len(mine), batch):
                yield [Draw(source, index) for index in mine[start:start + batch]]

    def __iter__(self):
        raise TypeError("MixedSampler draws batches: add batch_sampler=dict(type='MixedBatches') to the dataloader")

    def __len__(self) -> int:
        return len(self.dataset)


def apportion(least: list[int], weights: list[float]) -> list[int]:
    """The smallest numbers in the ratio of ``weights`` of which none is below ``least``; rounded up."""
    scale = max(number / weight for number, weight in zip(least, weights))
    return [max(number, int(np.ceil(weight * scale - 1e-9))) for number, weight in zip(least, weights)]


@SAMPLERS.register_module()
class MixedBatches(BatchSampler):
    """The ``batch_sampler`` that goes with :class:`MixedSampler`.

    Args:
        sampler: a ``MixedSampler``. batch_size: of every source, each rank's.
        batch_sizes: where sources have others: source → batch size.

    Raises:
        TypeError: another sampler. ValueError: ``batch_sizes`` names another source.
    """

    def __init__(self, sampler: MixedSampler, batch_size: int, batch_sizes: Mapping[str, int] | None = None):
        if not isinstance(sampler, MixedSampler):
            raise TypeError("MixedBatches goes with sampler=dict(type='MixedSampler'), got "
                            f'{type(sampler).__name__}')
        names = sampler.dataset.names
        for name in batch_sizes or ():
            if name not in names:
                raise ValueError(f'MixedBatches: batch_sizes has no source {name!r}; {nearest(name, names)}')
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, False
        self.sizes = [check_integer(f'MixedBatches: batch size of {name}', (batch_sizes or {}).get(name, batch_size), 1)
                      for name in names]

    def __iter__(self) -> Iterator[list[Draw]]:
        return self.sampler.batches(self.sizes)

    def __len__(self) -> int:
        return sum(self.sampler.counts(self.sizes))
