"""Edge convolutions against the published formula written out edge by edge."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewa3d.layers.block import Pointwise
from ewa3d.layers.dgcnn import DGCNN, EdgeConv
from ewa3d.ops import neighbours


def graph_of(B: int, G: int, k: int = 4) -> torch.Tensor:
    center = torch.randn(B, G, 3)
    return neighbours(center, center, k)


def naive_edge_conv(layer: EdgeConv, x, graph):
    """Every edge ``[x_j - x_i, x_i]`` through a 2D convolution, group norm, activation, then the maximum."""
    linear, norm, _ = layer
    neighbour = torch.stack([cloud[idx] for cloud, idx in zip(x, graph)])  # (B, G, K, C)
    own = x.unsqueeze(2).expand_as(neighbour)
    edges = torch.cat([neighbour - own, own], -1).permute(0, 3, 1, 2)
    edges = F.conv2d(edges, linear.weight[..., None, None])
    edges = F.leaky_relu(F.group_norm(edges, norm.num_groups, norm.weight, norm.bias, norm.eps), 0.2)
    return edges.amax(-1).transpose(1, 2)


def scrambled(module: nn.Module) -> nn.Module:
    """In double precision, with norm weights of both signs."""
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.normal_(std=0.5)
    return module


@pytest.mark.parametrize('shape', [(2, 9, 6, 8, 4), (1, 4, 3, 12, 2), (3, 5, 8, 4, 1)])
def test_edge_conv_is_the_published_one_forward_and_backward(shape):
    B, G, cin, cout, norm_groups = shape
    layer, graph = scrambled(EdgeConv(cin, cout, norm_groups)), graph_of(B, G)
    x = torch.randn(B, G, cin, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x, graph), naive_edge_conv(layer, x, graph)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    for got, wanted in zip(torch.autograd.grad((y * weights).sum(), inputs),
                           torch.autograd.grad((expected * weights).sum(), inputs)):
        torch.testing.assert_close(got, wanted)


def test_batches_that_are_computed_as_convolutions():
    layer, graph = scrambled(EdgeConv(12, 16)).float(), graph_of(16, 9)
    x = torch.randn(16, 9, 12)
    torch.testing.assert_close(layer(x, graph), naive_edge_conv(layer, x, graph), atol=1e-5, rtol=1e-5)


def test_the_order_of_neighbours_has_no_meaning():
    layer, graph = scrambled(EdgeConv(6, 8)), graph_of(2, 9)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x, graph.flip(-1)), layer(x, graph))


def test_dgcnn_is_the_published_network():
    net, graph = scrambled(DGCNN(5, 16, widths=(6, 8, 12, 4, 8), norm_groups=2)), graph_of(2, 7)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    features, out = [], net.input_trans(x)
    for i in range(1, 5):
        out = naive_edge_conv(getattr(net, f'layer{i}'), out, graph)
        features.append(out)
    linear, norm, _ = net.layer5
    joined = F.conv1d(torch.cat(features, -1).transpose(1, 2), linear.weight.unsqueeze(-1))
    joined = F.leaky_relu(F.group_norm(joined, 2, norm.weight, norm.bias), 0.2).transpose(1, 2)
    for got, wanted in zip(net.features(x, graph), features):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(net(x, graph), joined)


def test_loads_the_weights_of_convolutions():
    net = DGCNN(5, 16, widths=(6, 8, 12, 4, 8))
    published = {name: value + 1 for name, value in net.state_dict().items()}
    published = {name: value.view(*value.shape, *[1] * (1 if 'input' in name or '5' in name else 2))
                 if value.ndim == 2 else value for name, value in published.items()}
    assert published['layer1.0.weight'].shape == (8, 12, 1, 1) and published['layer5.0.weight'].shape == (16, 32, 1)
    net.load_state_dict(published)
    assert all(torch.equal(value.flatten(1) if value.ndim > 2 else value, net.state_dict()[name])
               for name, value in published.items())
    with pytest.raises(RuntimeError, match='size mismatch'):  # a real kernel is no linear layer
        Pointwise(4, 6).load_state_dict(dict(weight=torch.ones(6, 4, 3), bias=torch.ones(6)))


def test_bf16_autocast_is_close():
    net, graph = DGCNN(8, 16, widths=(16, 16, 16, 16, 32)), graph_of(2, 9)
    x = torch.randn(2, 9, 8, requires_grad=True)
    expected = net(x, graph)
    with torch.autocast('cpu', torch.bfloat16):
        out = net(x, graph)
    out.float().square().sum().backward()
    assert (out.float() - expected).abs().mean() < 0.05 and torch.isfinite(x.grad).all()


@pytest.mark.parametrize('options, message', [
    (dict(widths=(8, 8, 8)), 'five integers'), (dict(widths='wide!'), 'five integers'),
    (dict(widths=(8, 8, 0, 8, 8)), 'each of widths must be at least 1'),
    (dict(widths=(8, 8, 6, 8, 8)), '6 channels cannot be split into norm_groups=4'),
    (dict(out_channels=10), '10 channels cannot be split'),
])
def test_impossible_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        DGCNN(**{**dict(in_channels=4, out_channels=8, widths=(8, 8, 8, 8, 8)), **options})
