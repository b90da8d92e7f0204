import copy

import pytest
import torch
from torch import nn

from ewa3d import ops
from ewa3d.layers.tokenizers import PatchEncoder, PointPatchEmbed
from ewa3d.registry import MODELS


class NaiveEncoder(nn.Module):
    """The mini-PointNet as published: 1×1 convolutions, the maximum repeated for every point and concatenated."""

    def __init__(self, in_channels, out_channels, widths=(128, 256, 512)):
        super().__init__()
        a, b, c = widths
        self.first_conv = nn.Sequential(nn.Conv1d(in_channels, a, 1), nn.BatchNorm1d(a), nn.ReLU(), nn.Conv1d(a, b, 1))
        self.second_conv = nn.Sequential(nn.Conv1d(2 * b, c, 1), nn.BatchNorm1d(c), nn.ReLU(),
                                         nn.Conv1d(c, out_channels, 1))

    def forward(self, patches):
        x = self.first_conv(patches.transpose(1, 2))  # (P, middle, K)
        x = torch.cat([x.max(-1, keepdim=True)[0].expand_as(x), x], 1)
        return self.second_conv(x).max(-1)[0]


def twins(in_channels=3, out_channels=20, widths=(8, 12, 16)):
    naive = NaiveEncoder(in_channels, out_channels, widths).double()
    for module in naive.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    ours = PatchEncoder(in_channels, out_channels, widths).double()
    ours.load_state_dict(naive.state_dict())
    return ours, naive


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('in_channels, P, K', [(3, 6, 5), (6, 2, 7), (3, 4, 1)])
def test_split_encoder_is_the_published_one(training, in_channels, P, K):
    ours, naive = twins(in_channels)
    ours.train(training), naive.train(training)
    patches = torch.randn(P, K, in_channels, dtype=torch.float64, requires_grad=True)
    out, expected = ours(patches), naive(patches)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), [patches, *ours.parameters()])
    expected = torch.autograd.grad((expected * weight).sum(), [patches, *naive.parameters()])
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b.view_as(a))
    for (name, a), (_, b) in zip(ours.named_buffers(), naive.named_buffers()):  # statistics, momentum, counters
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.parametrize('training', [True, False])
def test_some_of_the_patches_have_the_features_and_gradients_that_they_have_among_all(training):
    ours, naive = twins()
    ours.train(training), naive.train(training)
    patches = torch.randn(6, 5, 3, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([4, 0, 3])
    out, expected = ours(patches, keep), naive(patches)[keep]
    torch.testing.assert_close(out, expected)
    grads = torch.autograd.grad(out.square().sum(), [patches, *ours.parameters()])
    expected = torch.autograd.grad(expected.square().sum(), [patches, *naive.parameters()])
    for a, b in zip(grads, expected):
        torch.testing.assert_close(a, b.view_as(a))
    for (name, a), (_, b) in zip(ours.named_buffers(), naive.named_buffers()):
        torch.testing.assert_close(a, b, msg=name)


def test_embedding_some_of_the_groups():
    embed = PointPatchEmbed(num_groups=6, group_size=4, embed_dim=8, encoder_dim=5, widths=(4, 6, 8))
    groups = embed.group(torch.randn(2, 40, 3))
    keep = torch.tensor([[0, 3, 5], [2, 1, 4]])
    everything, some = embed.embed(*groups), embed.embed(*groups, keep)
    torch.testing.assert_close(some.x, ops.gather(everything.x, keep))
    torch.testing.assert_close(some.pos, ops.gather(everything.pos, keep))
    assert torch.equal(some.coord, everything.coord) and torch.equal(some.target, everything.target)


def test_keys_and_shapes_are_the_published_ones_but_for_the_convolution():
    ours, naive = twins()
    theirs = naive.state_dict()
    assert list(ours.state_dict()) == list(theirs)
    for key, value in ours.state_dict().items():
        assert value.shape == (theirs[key].squeeze(-1).shape if 'conv' in key and theirs[key].ndim == 3
                               else theirs[key].shape)


def test_loading_convolutions_leaves_the_source_alone():
    _, naive = twins()
    state = naive.state_dict()
    PatchEncoder(3, 20, (8, 12, 16)).load_state_dict(state)
    assert state['first_conv.0.weight'].shape == (8, 3, 1)
    wrong = dict(state, **{'first_conv.0.weight': torch.zeros(8, 3, 2)})
    with pytest.raises(RuntimeError, match=r'first_conv\.0\.weight'):
        PatchEncoder(3, 20, (8, 12, 16)).load_state_dict(wrong)


def tokenizer(**kwargs):
    small = dict(num_groups=6, group_size=5, embed_dim=16, widths=(8, 12, 16), pos_dim=8)
    return PointPatchEmbed(**{**small, **kwargs})


def test_tokens_are_what_they_say():
    layer = tokenizer()
    points = torch.randn(3, 50, 3)
    tokens = layer(dict(points=points))
    assert tokens.x.shape == tokens.pos.shape == (3, 6, 16)
    idx = ops.fps(points, 6)
    assert torch.equal(tokens.coord, ops.gather(points, idx))
    neighbours = ops.knn(tokens.coord, points, 5)[1]
    for b in range(3):
        for g in range(6):
            torch.testing.assert_close(tokens.target[b, g], points[b, neighbours[b, g]] - tokens.coord[b, g])
    torch.testing.assert_close(tokens.pos, layer.pos_embed(tokens.coord))


def test_a_tensor_will_do():
    layer = tokenizer().eval()
    points = torch.randn(2, 20, 3)
    of_tensor, of_dict = layer(points), layer(dict(points=points))
    assert of_tensor.prefix_pos is of_dict.prefix_pos is None
    for name in ('x', 'pos', 'coord', 'target'):
        assert torch.equal(getattr(of_tensor, name), getattr(of_dict, name))


def test_tokens_do_not_depend_on_the_order_within_the_cloud_or_its_place():
    layer = tokenizer().double().eval()
    points = torch.randn(1, 40, 3, dtype=torch.float64)
    shuffled = torch.cat([points[:, :1], points[:, 1:][:, torch.randperm(39)]], 1)  # sampling starts at the first
    torch.testing.assert_close(layer(points).x, layer(shuffled).x)
    torch.testing.assert_close(layer(points).x, layer(points + 1000).x)


def test_extra_features_ride_along():
    layer = tokenizer(in_channels=6).eval()
    points = torch.randn(2, 30, 6)
    center, patches = layer.group(points)
    idx = ops.knn(center, points[..., :3], 5)[1]
    assert torch.equal(patches[..., 3:], ops.gather(points[..., 3:], idx))
    tokens = layer(points)
    assert tokens.target.shape == (2, 6, 5, 3)
    flipped = torch.cat([points[..., :3], -points[..., 3:]], -1)
    assert torch.equal(layer(flipped).coord, tokens.coord)
    assert not torch.allclose(layer(flipped).x, tokens.x)


def test_encoder_dim_adds_reduce_dim():
    keys = set(tokenizer(encoder_dim=10).state_dict()) - set(tokenizer().state_dict())
    assert keys == {'reduce_dim.weight', 'reduce_dim.bias'}
    assert tokenizer(encoder_dim=10)(torch.randn(2, 20, 3)).x.shape == (2, 6, 16)
    assert 'reduce_dim.weight' in tokenizer(encoder_dim=16).state_dict()  # asked for, so there


def test_skip_origin_changes_the_centres():
    points = torch.randn(1, 60, 3) * 0.05
    layer, official = tokenizer(num_groups=50), tokenizer(num_groups=50, skip_origin=True)
    assert torch.equal(official(points).coord, ops.gather(points, ops.fps(points, 50, skip_origin=True)))
    assert not torch.equal(layer(points).coord, official(points).coord)


@pytest.mark.parametrize('shape, message', [
    ((2, 5, 3), '5 points.*num_groups=6'), ((2, 4, 3), '4 points.*group_size=5'), ((2, 20, 6), r'\(B, N, 3\)'),
    ((20, 3), r'\(B, N, 3\)')])
def test_refuses_points(shape, message):
    with pytest.raises(ValueError, match=message):
        tokenizer()(torch.randn(shape))


def test_refuses_fewer_points_than_neighbours():
    with pytest.raises(ValueError, match='group_size=9'):
        tokenizer(num_groups=2, group_size=9)(torch.randn(1, 8, 3))


def test_refuses_nan():
    points = torch.randn(2, 20, 3)
    points[1, 4, 2] = float('nan')
    with pytest.raises(ValueError, match=r'sample\(s\) \[1\]'):
        tokenizer()(points)


@pytest.mark.parametrize('kwargs', [dict(num_groups=0), dict(group_size=0), dict(in_channels=2), dict(widths=(8, 8)),
                                    dict(widths=(8, 0, 8)), dict(embed_dim=0), dict(encoder_dim=-3), dict(pos_dim=0)])
def test_refuses_settings(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        tokenizer(**kwargs)


@pytest.mark.parametrize('name', ['num_groups', 'group_size', 'embed_dim', 'encoder_dim', 'in_channels', 'pos_dim'])
@pytest.mark.parametrize('value', ['abc', 2.5])
def test_refuses_settings_that_are_no_integers(name, value):
    with pytest.raises(TypeError, match=f'{name} must be an integer, got {value!r}'):
        tokenizer(**{name: value})


def test_refuses_inputs_without_points():
    with pytest.raises(KeyError, match=r"need the key 'points', found \['features', 'point'\]"):
        tokenizer()(dict(point=torch.randn(2, 20, 3), features=None))
    for inputs in (dict(points=[[0., 0., 0.]]), None, dict(points=None)):
        with pytest.raises(TypeError, match=r'points must be a tensor'):
            tokenizer()(inputs)


def test_registered_with_helpful_errors():
    assert isinstance(MODELS.build(dict(type='PointPatchEmbed', num_groups=4)), PointPatchEmbed)
    with pytest.raises(TypeError, match='num_groups'):
        MODELS.build(dict(type='PointPatchEmbed', num_group=4))


def test_bf16_autocast_trains():
    layer = tokenizer()
    reference = copy.deepcopy(layer)
    points = torch.randn(4, 40, 3)
    with torch.autocast('cpu', torch.bfloat16):
        tokens = layer(points)
    torch.testing.assert_close(tokens.x.float(), reference(points).x, atol=0.05, rtol=0.1)
    assert tokens.target.dtype == torch.float32
    (tokens.x.float().square().mean() + tokens.pos.float().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert layer.encoder.first_conv[1].running_mean.dtype == torch.float32
