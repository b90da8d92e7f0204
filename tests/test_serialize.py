"""Curves through grids: bijections, neighbours, bits; the order of tokens, alone, in batches, on several curves."""
import pytest
import torch

from ewa3d.layers.serialize import (
    ORDERS,
    Serializer,
    curve_order,
    grid_cells,
    hilbert_decode,
    hilbert_encode,
    inverse_order,
    random_order,
    z_decode,
    z_encode,
)
from ewa3d.models.masked import MaskedAutoencoder
from ewa3d.models.token_model import MaskedTokenModel
from ewa3d.ops import gather
from ewa3d.registry import MODELS
from ewa3d.structures import Tokens

TOKENIZER = dict(type='PointPatchEmbed', num_groups=6, group_size=4, widths=(8, 12, 16), pos_dim=8)


def encoder(**options):
    return MODELS.build(dict(type='TokenEncoder', tokenizer=TOKENIZER, embed_dim=12, depth=2, num_heads=2, **options))


@pytest.mark.parametrize(('dims', 'depth'), [(1, 4), (2, 1), (2, 4), (3, 1), (3, 2), (3, 3), (4, 2)])
def test_curves_visit_every_cell_once(dims, depth):
    code = torch.arange(2 ** (dims * depth))
    cells = torch.cartesian_prod(*[torch.arange(2 ** depth)] * dims).view(-1, dims)
    for encode, decode in ((hilbert_encode, hilbert_decode), (z_encode, z_decode)):
        assert torch.equal(encode(cells, depth).sort().values, code)
        assert torch.equal(encode(decode(code, dims, depth), depth), code)
        assert torch.equal(decode(encode(cells, depth), dims, depth), cells)
    steps = hilbert_decode(code, dims, depth).diff(dim=0)
    assert (steps.abs().sum(-1) == 1).all()  # one cell along one axis


def test_bits_of_the_z_order():
    cells = torch.tensor([[0b101, 0b011, 0b110], [1, 0, 0], [0, 0, 1]])
    assert z_encode(cells, 3).tolist() == [0b101011110, 4, 1]
    assert z_encode(cells.view(1, 3, 3), 3).shape == (1, 3)


@pytest.mark.parametrize(('dims', 'depth'), [(3, 21), (2, 31), (1, 63)])
def test_all_63_bits(dims, depth):
    cells = torch.randint(2 ** min(depth, 62), (50, dims))
    for encode, decode in ((hilbert_encode, hilbert_decode), (z_encode, z_decode)):
        code = encode(cells, depth)
        assert (code >= 0).all() and torch.equal(decode(code, dims, depth), cells)


@pytest.mark.parametrize('order', ORDERS)
def test_an_order_is_a_permutation_and_each_sample_has_its_own(order):
    coord = torch.rand(4, 30, 3) * 2 - 1
    found = curve_order(coord, order)
    assert torch.equal(found.sort(1).values, torch.arange(30).expand(4, -1))
    inverse = inverse_order(found)
    assert torch.equal(gather(gather(coord, found), inverse), coord)
    for b in range(4):  # whatever else is in the batch, and wherever the cloud is
        assert torch.equal(curve_order(coord[b:b + 1], order), found[b:b + 1])
    shifted = curve_order(coord + 64 * 0.02, order)
    assert (shifted == found).float().mean() > 0.8  # but for rounding at the sides of cells
    along, shuffled = (gather(coord, o).diff(dim=1).norm(dim=-1).sum() for o in (
        found, torch.rand(4, 30).argsort(1)))
    assert along < 0.8 * shuffled


def test_exchanged_axes_and_ties():
    coord = torch.rand(2, 20, 3)
    swapped = coord[..., [1, 0, 2]]
    for order in ('hilbert', 'z'):
        assert torch.equal(curve_order(coord, f'{order}-trans'), curve_order(swapped, order))
    assert torch.equal(curve_order(torch.zeros(1, 5, 3)), torch.arange(5)[None])


def test_cells():
    coord = torch.tensor([[[-0.5, 0.1], [0.25, 0.1], [0.26, 0.61]], [[7., 7.], [7., 7.], [7., 7.]]])
    assert grid_cells(coord, 0.25, 3).tolist() == [[[0, 0], [3, 0], [3, 2]], [[0, 0]] * 3]
    assert grid_cells(torch.zeros(0, 4, 3)).shape == (0, 4, 3)


def test_serializer_moves_everything_alike():
    tokens = Tokens(torch.randn(2, 7, 5), torch.randn(2, 7, 5), torch.randn(2, 7, 3), torch.randn(2, 7, 4, 3))
    order = curve_order(tokens.coord, 'z')
    for got, value in zip(Serializer('z', 5)(tokens), tokens):
        assert (value is None and got is None) or all(torch.equal(got[b], value[b, order[b]]) for b in range(2))
    two = Serializer(['hilbert', 'z'], 5)
    x, pos, coord, target, prefix = two(tokens)
    for value in (x, pos, coord, target):
        assert value.shape[1] == 14
    assert prefix is None and torch.equal(coord[:, 7:], gather(tokens.coord, order))
    torch.testing.assert_close(x[:, 7:], gather(tokens.x, order) * two.weight[1] + two.bias[1])
    assert not torch.equal(two.weight[0], two.weight[1])


def test_the_order_of_a_backbone():
    torch.manual_seed(0)
    plain = encoder().eval()
    ordered = encoder(order='hilbert').eval()
    ordered.load_state_dict(plain.state_dict())  # one order has no parameters
    points = torch.randn(2, 20, 3)
    order = curve_order(plain.tokenize(points).coord)
    torch.testing.assert_close(ordered(points)[:, 1:], gather(plain(points)[:, 1:], order))  # attention has none
    assert encoder(order=['hilbert', 'hilbert-trans'])(points).shape == (2, 13, 12)


def test_a_random_order():
    """In training a permutation of its own for each sample and call; in eval one that is always the same."""
    coord = torch.rand(3, 40, 3)
    one, two = random_order(coord, True), random_order(coord, True)
    assert not torch.equal(one, two) and not torch.equal(one[0], one[1])
    fixed = random_order(coord, False)
    assert torch.equal(fixed, random_order(coord[:1], False).expand(3, -1)) and fixed.dtype == torch.int64
    for order in (one, two, fixed):
        assert torch.equal(order.sort(1).values, torch.arange(40).expand(3, -1))
    distance = (fixed[0].diff().abs().double() > 1).double().mean()
    assert distance > 0.8  # neighbours do not stay neighbours
    model = encoder(order=['hilbert', 'random'], drop_path_rate=0.).eval()
    points = torch.randn(2, 20, 3)
    feats = model(points)
    assert feats.shape == (2, 13, 12) and torch.equal(feats, model(points))
    tokens, plain = model.tokenize(points), model.tokenizer(points)
    assert torch.equal(tokens.coord[:, 6:], plain.coord[:, random_order(plain.coord, False)[0]])
    model.train()
    assert not torch.equal(model.tokenize(points).coord[:, 6:], model.tokenize(points).coord[:, 6:])


@pytest.mark.parametrize(('order', 'error', 'message'), [
    ('hilbrt', ValueError, "order='hilbrt': did you mean 'hilbert'"), ([], ValueError, 'at least one order'),
    (['z', 'z'], ValueError, 'each once'), (3, TypeError, 'a name or a list of names'),
    (['z', 1], TypeError, 'a name or a list of names')])
def test_unknown_orders(order, error, message):
    with pytest.raises(error, match=message):
        encoder(order=order)


def test_mistakes():
    for coord, message in ((torch.full((1, 3, 3), torch.nan), 'finite and span at most'),
                           (torch.tensor([[[0.], [1e9]]]), 'span at most 2.10 cells of grid_size=0.02'),
                           (torch.rand(3, 3), r'coordinates \(B, L, D\)'),
                           (torch.zeros(1, 3, 3, dtype=torch.long), r'coordinates \(B, L, D\)')):
        with pytest.raises(ValueError, match=message):
            curve_order(coord)
    with pytest.raises(ValueError, match="order='x'"):
        curve_order(torch.rand(1, 3, 3), 'x')
    with pytest.raises(ValueError, match='needs 66 bits'):
        hilbert_encode(torch.zeros(3, dtype=torch.long), 22)
    with pytest.raises(TypeError, match='int64'):
        z_encode(torch.zeros(3), 2)
    with pytest.raises(TypeError, match='int64'):
        z_decode(torch.zeros(3), 3, 2)
    with pytest.raises(ValueError, match='order_grid must lie in'):
        encoder(order='z', order_grid=0.)


def test_masked_models_take_no_order():
    backbone = dict(type='TokenEncoder', tokenizer=TOKENIZER, embed_dim=12, depth=1, num_heads=2, order='z')
    dvae = dict(type='DiscreteVAE', num_groups=6, group_size=4)
    for make in (lambda: MaskedAutoencoder(backbone, decoder_depth=1, decoder_num_heads=2),
                 lambda: MaskedTokenModel(backbone, dvae)):
        with pytest.raises(ValueError, match=r"order=\['z'\]: leave it out"):
            make()
