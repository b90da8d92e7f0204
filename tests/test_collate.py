"""Batches arrive from a worker as they would have without one, in few tensors."""
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from torch.utils.data import DataLoader

from ewa3d.datasets import Batch, packed_collate
from ewa3d.datasets.collate import SMALL, _Packed
from ewa3d.engine.runner import Runner
from ewa3d.structures import Sample


def sample(i: int, points: int = 200) -> dict:
    cloud = torch.full((points, 3), float(i)) + torch.arange(points)[:, None]
    meta = Sample(metainfo=dict(name=f'cloud {i}', index=i), gt_label=torch.tensor(i),
                  gt_parts=torch.arange(points) + i, gt_boxes=torch.zeros(i % 3, 7),
                  masked=torch.ones(3000, dtype=torch.bool))
    return dict(inputs=dict(points=cloud, category=torch.tensor(i)), data_samples=meta)


def check_equal(one, other):
    assert type(one) is type(other) or {type(one), type(other)} == {dict, Batch}
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            check_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            check_equal(a, b)
    elif isinstance(one, Sample):
        check_equal(dict(sorted(one.items())), dict(sorted(other.items())))  # a set names the fields: no order
        assert dict(one.metainfo_items()) == dict(other.metainfo_items())
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape and one.is_contiguous() == other.is_contiguous()
        assert torch.equal(one, other) and one.requires_grad == other.requires_grad
    else:
        assert np.array_equal(one, other)


@pytest.mark.parametrize('sizes', [(200, 200, 200), (200, 1, 0, 777)])
def test_a_batch_arrives_as_it_was(sizes):
    samples = [sample(i, size) for i, size in enumerate(sizes)]
    batch = packed_collate(samples)
    assert isinstance(batch, Batch) and isinstance(batch, dict)
    arrived = pickle.loads(ForkingPickler.dumps(batch))
    assert type(arrived) is dict
    check_equal(arrived, pseudo_collate(samples))


def test_large_tensors_travel_in_one_piece_and_small_ones_with_the_rest():
    batch = packed_collate([sample(i) for i in range(8)])
    packed = _Packed.of(batch['data_samples'])
    assert sorted(str(t.dtype) for t in packed.flat) == ['torch.bool', 'torch.int64']
    assert len(packed.places) == 16 and all(shape.numel() > SMALL / 8 for *_, shape in packed.places)
    assert [t.shape for t in _Packed.of(batch['inputs']).flat] == [(8 * 200 * 3,)]
    label = pickle.loads(ForkingPickler.dumps(batch))['data_samples'][3].gt_label
    assert label.untyped_storage().nbytes() == 8  # keeping it keeps nothing else
    label += 1


@pytest.mark.parametrize('value', [
    torch.randn(2000).bfloat16(), torch.randn(3).bfloat16(), torch.randn(20, 40).T,
    torch.randn(2000, requires_grad=True), torch.eye(3).to_sparse(), torch.randn(2000, dtype=torch.complex64),
    torch.nn.Parameter(torch.ones(2)),
    torch.tensor(1.5, dtype=torch.float16), torch.zeros(0, 7), torch.randn(1, 5).expand(400, 5), 'text', 3, None,
    np.arange(3)], ids=lambda value: str(getattr(value, 'dtype', type(value).__name__)))
def test_any_content_arrives(value):
    arrived = pickle.loads(ForkingPickler.dumps(Batch(a=[value], b=value)))
    for got in (arrived['a'][0], arrived['b']):
        assert type(got) is type(value)
        if isinstance(value, torch.Tensor):
            assert got.dtype == value.dtype and got.shape == value.shape and got.requires_grad == value.requires_grad
            assert torch.equal(got.detach().to_dense(), value.detach().to_dense())
        else:
            assert np.array_equal(got, value)


def test_a_tensor_that_occurs_twice_arrives_once():
    shared = torch.randn(2000)
    one, other = pickle.loads(ForkingPickler.dumps(Batch(a=[shared, shared])))['a']
    assert one is other


def test_through_a_worker():
    samples = [sample(i) for i in range(6)]
    loaders = [DataLoader(samples, 3, collate_fn=packed_collate, num_workers=n) for n in (0, 1)]
    for here, there in zip(*loaders):
        check_equal(here, there)


def test_batches_that_are_no_dicts_stay_as_they_are():
    assert type(packed_collate([(torch.zeros(2), 1)])) is not Batch


def test_the_runner_takes_it_unless_told_otherwise(tmp_path):
    cfg = dict(batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(
        type='ewa3d.SyntheticShapes', num_samples=4, num_points=32, pipeline=[dict(type='Pack')]))
    assert isinstance(next(iter(Runner.build_dataloader(cfg))), Batch)
    plain = Runner.build_dataloader(dict(cfg, collate_fn=dict(type='pseudo_collate')))
    assert type(next(iter(plain))) is dict and 'collate_fn' not in cfg
