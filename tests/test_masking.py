"""Masks: how many, which, and that nothing but torch's generator decides."""
import pytest
import torch

from ewa3d.models.masking import MASKS, block_mask, iid_mask, mask_function, mask_parts, random_mask

MASK_FUNCTIONS = pytest.mark.parametrize('function', [random_mask, block_mask])


def centres(B=5, G=16):
    return torch.randn(B, G, 3)


def naive_block(coord, middle, count):
    """One cloud: the tokens nearest to ``middle``."""
    distance = [sum((a - b) ** 2 for a, b in zip(coord[middle].tolist(), row)) for row in coord.tolist()]
    return set(sorted(range(len(distance)), key=distance.__getitem__)[:count])


@MASK_FUNCTIONS
@pytest.mark.parametrize('ratio', [0.6, 0, 1, 0.5, 0.999, 0.29])
def test_every_cloud_masks_the_same_number(function, ratio):
    mask = function(centres(7, 100), ratio)
    assert mask.dtype == torch.bool and mask.shape == (7, 100)
    assert (mask.sum(1) == int(ratio * 100)).all()


@MASK_FUNCTIONS
def test_a_ratio_for_each_cloud(function):
    ratio = torch.tensor([0., 0.25, 0.45, 0.99, 1.])
    assert function(centres(5, 64), ratio).sum(1).tolist() == [0, 16, 28, 63, 64]


@MASK_FUNCTIONS
def test_a_range_is_drawn_from_for_each_cloud(function):
    counts = function(centres(300, 64), (0.25, 0.45)).sum(1)
    assert counts.min() >= 16 and counts.max() <= 28 and len(counts.unique()) > 8
    assert (function(centres(3, 64), [0.5, 0.5]).sum(1) == 32).all()


@MASK_FUNCTIONS
def test_the_generator_decides(function):
    coord = centres()

    def draw(seed):
        return function(coord, 0.6, generator=torch.Generator().manual_seed(seed))

    state = torch.get_rng_state()
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    first = function(coord, 0.6)
    torch.manual_seed(5)
    assert torch.equal(function(coord, 0.6), first) and not torch.equal(function(coord, 0.6), first)


def test_random_masks_are_uniform_and_differ_between_clouds():
    mask = random_mask(centres(4000, 10), 0.3).float()
    assert torch.allclose(mask.mean(0), torch.tensor(0.3), atol=0.04)
    together = (mask.t() @ mask / 4000).fill_diagonal_(0.3 * 0.2 / 0.9)
    assert torch.allclose(together, torch.tensor(0.3 * 0.2 / 0.9), atol=0.03)  # without replacement


def test_iid_masks_each_token_by_itself():
    mask = iid_mask(centres(500, 40), 0.3)
    assert len(mask.sum(1).unique()) > 5
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.02)
    ratio = torch.tensor([0., 1.])
    assert iid_mask(centres(2, 9), ratio).tolist() == [[False] * 9, [True] * 9]


def test_iid_masks_take_ranges_and_a_generator():
    masks = [iid_mask(centres(50, 400), (0.2, 0.6), torch.Generator().manual_seed(3)) for _ in range(2)]
    shares = masks[0].float().mean(1)
    assert torch.equal(*masks) and 0.1 < shares.min() < 0.3 < 0.5 < shares.max() < 0.7


def test_a_block_is_a_token_and_those_nearest_to_it():
    coord = centres(40, 12)
    seen = set()
    for cloud, mask in zip(coord, block_mask(coord, 0.45)):
        masked = set(mask.nonzero().flatten().tolist())
        middles = [m for m in masked if naive_block(cloud, m, 5) == masked]
        assert middles
        seen.update(middles)
    assert len(seen) > 8  # any token may be the middle
    one = block_mask(coord, 0.1)
    assert (one.sum(1) == 1).all() and len(one.int().argmax(1).unique()) > 6


def test_a_block_of_tokens_at_one_place_contains_its_middle():
    coord = torch.zeros(400, 4, 3)
    assert torch.allclose(block_mask(coord, 0.25).float().mean(0), torch.tensor(0.25), atol=0.1)


def test_parts_are_in_the_order_of_the_tokens():
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]]).bool()
    visible, masked = mask_parts(mask, 2)
    assert visible.tolist() == [[1, 2, 4], [0, 1, 3]] and masked.tolist() == [[0, 3], [2, 4]]


@MASK_FUNCTIONS
def test_compiled_without_a_break(function):
    mask = torch.compile(function, backend='aot_eager', fullgraph=True)(centres(3, 20), 0.5)
    assert (mask.sum(1) == 10).all()


@MASK_FUNCTIONS
@pytest.mark.parametrize('ratio, error, message', [
    (1.2, ValueError, r'mask ratio must lie in \[0, 1\], got 1.2'),
    (-0.1, ValueError, r'got -0.1'),
    (float('nan'), ValueError, 'nan'),
    ('0.6', TypeError, "mask ratio must be a number, got '0.6'"),
    (None, TypeError, 'got None'),
    (torch.tensor([0.5, 0.5]), ValueError, r'shape \(5,\) expected, got \(2,\)'),
    (torch.tensor([0.5, 0.5, 0.5, 0.5, 1.5]), ValueError, r'must lie in \[0, 1\], got \[.*1.5\]'),
    ((0.5, 0.4), ValueError, r'\(low, high\), got \(0.5, 0.4\)'),
    ((0.5,), ValueError, r'\(low, high\)'),
    ((0.5, 1.4), ValueError, '1.4'),
])
def test_refuses_ratios(function, ratio, error, message):
    with pytest.raises(error, match=message):
        function(centres(), ratio)


@MASK_FUNCTIONS
def test_refuses_coordinates_of_another_shape(function):
    with pytest.raises(ValueError, match=r'\(B, G, D\), got \(5, 16\)'):
        function(centres()[..., 0], 0.5)


def test_names():
    assert mask_function('rand') is MASKS['rand'] is random_mask
    with pytest.raises(ValueError, match=r"mask_type='blok'; did you mean 'block'"):
        mask_function('blok')
    with pytest.raises(ValueError, match="mask_type='iid'; valid names: block, rand"):
        mask_function('iid', ('rand', 'block'))
