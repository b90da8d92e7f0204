"""Several data sets as one; batches of one source, by weights."""
from collections import Counter

import pytest
import torch
from mixed_toys import ToyClouds, ToyImages, on_cpu  # noqa: F401
from torch.utils.data import DataLoader

from ewa3d.datasets.mixed import Draw, MixedBatches, MixedDataset, MixedSampler, apportion
from ewa3d.registry import DATASETS


def mixed(clouds: int = 22, images: int = 9) -> MixedDataset:
    return MixedDataset(dict(clouds=ToyClouds(clouds), images=ToyImages(images)))


def epoch_of(sampler: MixedSampler, epoch: int = 0, sizes=(4, 4)) -> list[list[Draw]]:
    sampler.set_epoch(epoch)
    return list(sampler.batches(list(sizes)))


def test_dataset():
    data = DATASETS.build(dict(type='MixedDataset', sources=dict(
        a=dict(type='ToyClouds', num_samples=3), b=dict(type='ToyImages', num_samples=2, split='val'))))
    assert len(data) == 5 and data.sizes == [3, 2] and data.names == ('a', 'b') and data.split is None
    assert data.metainfo['sources']['b']['classes'][0] == 'rows'
    names = [(data[i]['data_samples'].get('source'), data[i]['data_samples'].get('name')) for i in range(5)]
    assert names == [('a', 'toy0'), ('a', 'toy1'), ('a', 'toy2'), ('b', 'image0'), ('b', 'image1')]
    assert data[Draw(1, 1)]['data_samples'].get('name') == 'image1'
    first, again = (data[Draw(1, 1, repeat)]['inputs']['img'] for repeat in (0, 1))
    assert not torch.equal(first, again) and torch.equal(first, data[4]['inputs']['img'])
    for wrong in (5, -1):
        with pytest.raises(IndexError):
            data[wrong]


@pytest.mark.parametrize(('sources', 'error'), [({}, ValueError), ([], TypeError), (dict(type='ToyClouds'), TypeError)])
def test_wrong_sources(sources, error):
    with pytest.raises(error, match='sources'):
        MixedDataset(sources)


@pytest.mark.parametrize('weights', [None, dict(clouds=1, images=1), dict(clouds=1, images=3),
                                     dict(clouds=5, images=1)])
def test_batches_are_of_one_source_and_see_everything(weights):
    sampler = MixedSampler(mixed(), weights, seed=0)
    for epoch in (0, 1):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == sum(sampler.counts([4, 4])) == len(MixedBatches(sampler, 4))
        assert all(len(batch) == 4 and len({draw.source for draw in batch}) == 1 for batch in batches)
        draws = [draw for batch in batches for draw in batch]
        for source, size in enumerate((22, 9)):
            seen = Counter(draw.index for draw in draws if draw.source == source)
            assert set(seen) == set(range(size)) and max(seen.values()) - min(seen.values()) <= 1
        assert len(draws) == len(set(draws))  # a sample that comes again is another repeat
    counts = sampler.counts([4, 4])
    if weights is None:
        assert counts == [6, 3]
    else:
        assert counts[0] >= 6 and counts[1] >= 3
        assert abs(counts[0] / weights['clouds'] - counts[1] / weights['images']) < 1


def test_a_function_of_seed_and_epoch():
    one, same, other = (MixedSampler(mixed(), seed=seed) for seed in (3, 3, 4))
    assert epoch_of(one, 5) == epoch_of(same, 5)
    assert epoch_of(one, 5) != epoch_of(one, 6) and epoch_of(one, 5) != epoch_of(other, 5)
    order = [batch[0].source for batch in epoch_of(one, 0)]
    assert order != sorted(order)


def test_ranks_draw_the_same_source_and_other_samples():
    ranks = []
    for rank in range(2):
        sampler = MixedSampler(mixed(), dict(clouds=1, images=1), seed=1)
        sampler.rank, sampler.world_size = rank, 2
        ranks.append(epoch_of(sampler))
    assert [batch[0].source for batch in ranks[0]] == [batch[0].source for batch in ranks[1]]
    assert len(ranks[0]) == 6  # three batches of four on two ranks for 22 clouds
    everything = [draw for batches in ranks for batch in batches for draw in batch]
    assert len(everything) == len(set(everything)) == 48
    assert {draw.index for draw in everything if draw.source == 0} == set(range(22))


@pytest.mark.parametrize('world_size', [1, 2])
def test_evaluation_sees_each_sample_once(world_size):
    draws = []
    for rank in range(world_size):
        sampler = MixedSampler(mixed(), shuffle=False, seed=0)
        sampler.rank, sampler.world_size = rank, world_size
        batches = epoch_of(sampler, sizes=(4, 2))
        assert len(batches) == sum(sampler.counts([4, 2]))
        assert all(len({draw.source for draw in batch}) == 1 for batch in batches)
        draws += [draw for batch in batches for draw in batch]
    assert sorted(draws) == [*(Draw(0, i) for i in range(22)), *(Draw(1, i) for i in range(9))]


def test_batch_sizes_and_loader():
    batches = MixedBatches(MixedSampler(mixed(), seed=0), 4, batch_sizes=dict(images=3))
    sizes = Counter((batch[0].source, len(batch)) for batch in batches)
    assert sizes == {(0, 4): 6, (1, 3): 3}
    loader = DataLoader(mixed(), batch_sampler=batches, collate_fn=list)
    assert [len(batch) for batch in loader] == [len(batch) for batch in batches]


def test_a_tiny_source_is_gone_through_several_times_within_a_batch():
    sampler = MixedSampler(mixed(20, 3), seed=0)
    images = next(batch for batch in epoch_of(sampler, sizes=(8, 8)) if batch[0].source == 1)
    assert Counter(draw.repeat for draw in images) == {0: 3, 1: 3, 2: 2}


def test_wrong_settings():
    data = mixed()
    with pytest.raises(TypeError, match='MixedDataset was expected, got ToyClouds'):
        MixedSampler(ToyClouds())
    with pytest.raises(ValueError, match="no source 'image'; did you mean 'images'"):
        MixedSampler(data, dict(clouds=1, image=1), seed=0)
    with pytest.raises(ValueError, match='weights lacks images'):
        MixedSampler(data, dict(clouds=1), seed=0)
    with pytest.raises(ValueError, match=r'weights.images must lie in \(0, inf\)'):
        MixedSampler(data, dict(clouds=1, images=0), seed=0)
    with pytest.raises(TypeError, match='MixedBatches'):
        iter(MixedSampler(data, seed=0))
    with pytest.raises(TypeError, match='goes with'):
        MixedBatches(torch.utils.data.SequentialSampler(data), 4)
    with pytest.raises(ValueError, match="no source 'image'"):
        MixedBatches(MixedSampler(data, seed=0), 4, dict(image=3))
    with pytest.raises(ValueError, match='at least 1'):
        MixedBatches(MixedSampler(data, seed=0), 0)


def test_apportion():
    assert apportion([6, 3], [2, 1]) == [6, 3] and apportion([6, 3], [1, 1]) == [6, 6]
    assert apportion([6, 3], [1, 3]) == [6, 18] and apportion([5, 1], [0.3, 0.1]) == [5, 2]
