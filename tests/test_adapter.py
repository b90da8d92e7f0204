"""Linear adapters: identity at first, merged exactly, in and around experts."""
import copy

import pytest
import torch
from torch import nn
from toys import MODELS as TOYS
from toys import make_model, scramble, train_steps

from ewa3d import attach_ewa, expand, fuse
from ewa3d.layers.adapter import LinearAdapter
from ewa3d.layers.block import Block, Mlp, Pointwise


def naive(linear: nn.Linear, adapter, position: str, x):
    """The two, written out token by token."""
    def affine(weight, bias, v):
        out = [sum(weight[i, j] * v[j] for j in range(len(v))) for i in range(len(weight))]
        return torch.stack(out) + (0 if bias is None else bias)

    def bottleneck(v):
        low = affine(adapter.down.weight, adapter.down.bias, v)
        return v + adapter.scale * affine(adapter.up.weight, adapter.up.bias, low)

    rows = []
    for v in x.reshape(-1, x.shape[-1]):
        v = bottleneck(v) if position == 'before' else v
        v = affine(linear.weight, linear.bias, v)
        rows.append(bottleneck(v) if position == 'after' else v)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize('position', ['before', 'after'])
@pytest.mark.parametrize('linear_bias', [True, False])
@pytest.mark.parametrize('bias', [None, True, False])
def test_against_a_naive_twin_and_fused(position, linear_bias, bias):
    linear = nn.Linear(5, 7, linear_bias).double()
    adapter = LinearAdapter.expand(linear, position, rank=2, scale=0.5, bias=bias).eval()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(adapter(x), linear(x))
    scramble(adapter, 0.3)
    expected, got = naive(adapter, adapter.adapter, position, x), adapter(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(got)
    leaves = [x, *adapter.parameters()]
    for a, b in zip(torch.autograd.grad((got * weights).sum(), leaves),
                    torch.autograd.grad((expected * weights).sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    fused = adapter.fuse()
    assert type(fused) is nn.Linear and not fused.training
    assert (fused.bias is not None) == (linear_bias or bias is True)
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-12)


def test_default_sizes_and_start():
    adapter = LinearAdapter.expand(nn.Linear(16, 40))
    assert adapter.adapter.down.weight.shape == (4, 16) and adapter.adapter.dropout.p == 0.1
    assert adapter.adapter.scale == 0.5 and not adapter.adapter.up.weight.any() and not adapter.adapter.up.bias.any()
    assert 0 < adapter.adapter.down.weight.std() < 0.05 and not adapter.adapter.down.bias.any()
    assert LinearAdapter.expand(nn.Linear(16, 40), 'after').adapter.up.weight.shape == (40, 10)
    assert LinearAdapter.expand(nn.Linear(2, 2)).adapter.down.out_features == 1
    assert "position='before'" in repr(adapter) and 'bias=True' in repr(adapter)


def test_dropout_acts_in_training_only():
    adapter = LinearAdapter.expand(nn.Linear(6, 6), dropout=0.5)
    scramble(adapter)
    x = torch.randn(4, 6)
    assert not torch.equal(adapter(x), adapter(x))
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))


def test_flags_dtype_and_mode_are_kept():
    linear = nn.Linear(6, 3).to(torch.bfloat16).eval()
    linear.weight.requires_grad_(False)
    adapter = LinearAdapter.expand(linear)
    assert not adapter.training and adapter.adapter.up.weight.dtype == torch.bfloat16
    assert (adapter.weight.requires_grad, adapter.bias.requires_grad) == (False, True)
    scramble(adapter.adapter, 0.3)
    fused = adapter.fuse()
    assert (fused.weight.requires_grad, fused.bias.requires_grad) == (False, True)
    assert fused.weight.dtype == fused.bias.dtype == torch.bfloat16
    x = torch.randn(4, 6).to(torch.bfloat16)
    torch.testing.assert_close(fused(x), adapter(x), rtol=0.05, atol=0.05)
    adapter.adapter.up.weight.data.zero_()
    assert torch.equal(linear.weight, LinearAdapter.expand(linear).weight)


@pytest.mark.parametrize(('plain', 'options', 'error', 'message'), [
    (nn.Linear(4, 8), dict(position='beside'), ValueError, "position='beside'"),
    (nn.Linear(4, 8), dict(rank=5), ValueError, 'rank=5 is larger than the width 4'),
    (nn.Linear(8, 4), dict(rank=5, position='after'), ValueError, 'rank=5 is larger than the width 4'),
    (nn.Linear(4, 8), dict(rank=0), ValueError, 'rank must be at least 1'),
    (nn.Linear(4, 8), dict(rank=1.5), TypeError, 'rank must be an integer'),
    (nn.Linear(4, 8), dict(ratio=1.5), ValueError, 'ratio must lie in'),
    (nn.Linear(4, 8), dict(dropout=1), ValueError, 'dropout must lie in'),
    (nn.Linear(4, 8), dict(scale='big'), TypeError, 'scale must be a number'),
    (Mlp(4), {}, TypeError, 'stands beside an nn.Linear, got Mlp'),
    (Pointwise(4, 4), {}, TypeError, 'got Pointwise'),
    (nn.MultiheadAttention(4, 2).out_proj, {}, TypeError, 'got NonDynamicallyQuantizableLinear')])
def test_mistakes(plain, options, error, message):
    with pytest.raises(error, match=message):
        LinearAdapter.expand(plain, **options)


def test_two_on_one_layer_are_refused():
    model = nn.ModuleDict(dict(a=nn.Linear(4, 4)))
    rule = dict(type='LinearAdapter', at='a')
    with pytest.raises(ValueError, match='is already a LinearAdapter'):
        expand(model, [rule, dict(rule, position='after')])


FOUR = [('attn.qkv', 'before'), ('attn.proj', 'after'), ('mlp.fc1', 'before'), ('mlp.fc2', 'after')]
ADAPTERS = [dict(type='LinearAdapter', at=f'*.{at}', position=position, rank=2) for at, position in FOUR]
EWA = dict(type='EWAFFN', at='*.mlp', num_experts=3)


def blocks(dtype=torch.float64) -> nn.Sequential:
    return nn.Sequential(*(Block(8, 2, 2., qkv_bias=True) for _ in range(2))).to(dtype)


@pytest.mark.parametrize('rules', [ADAPTERS, [EWA, *ADAPTERS], [*ADAPTERS, EWA]],
                         ids=['adapters', 'adapters in experts', 'experts of adapted FFNs'])
def test_a_block_with_and_without_experts(rules):
    model, x = blocks(), torch.randn(2, 6, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    expand(model, rules)
    torch.testing.assert_close(model.eval()(x), plain(x), rtol=0, atol=1e-12)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    handle = attach_ewa(optimizer, model, total_steps=4) if EWA in rules else None
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    if handle is not None:
        handle.remove()
    before = model.eval()(x)
    assert (before - plain(x)).abs().max() > 1e-3
    fuse(model)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]


def test_merging_commutes_with_averaging():
    """The mean of the merged experts is the mean expert, merged, where all have the same adapter."""
    model = nn.ModuleDict(dict(mlp=Mlp(6, 9).double()))
    expand(model, [dict(EWA, at='mlp', init_noise_std=0.3)])
    mean = copy.deepcopy(model)
    fuse(mean)
    for target, position, width in (('fc1', 'before', 6), ('fc2', 'after', 6)):
        rule = dict(type='LinearAdapter', at=f'mlp.{target}', position=position, rank=2)
        for m in (model, mean):
            expand(m, rule)
        one, other = (getattr(m['mlp'], target).adapter for m in (model, mean))
        assert one.down.weight.shape == (3, 2, width)
        with torch.no_grad():
            for a, b in zip(one.parameters(), other.parameters()):
                b.copy_(torch.randn_like(b) * 0.3)
                a.copy_(b.expand_as(a))
    merged = model['mlp'].fc1.fuse()  # each expert's
    assert merged.weight.shape == (3, 9, 6) and merged.bias.shape == (3, 9)
    torch.testing.assert_close(merged.weight.mean(0), mean['mlp'].fc1.fuse().weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged.bias.mean(0), mean['mlp'].fc1.fuse().bias, rtol=0, atol=1e-12)
    fuse(model)
    fuse(mean)
    for a, b in zip(model.parameters(), mean.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_frozen_weights_stay_as_they_are():
    name = 'timm ViT'
    assert name in TOYS
    model, _, x = make_model(name)
    model.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expand(model, [dict(type='LinearAdapter', at='blocks.*.attn.qkv')])
    assert all('adapter' in key for key, p in model.named_parameters() if p.requires_grad)
    train_steps(model, x)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())
    assert any(state[key].any() for key in state if 'adapter.up' in key)


@pytest.mark.parametrize(('name', 'options'), [
    ('beit', dict(init_values=0.1, use_abs_pos_emb=True)), ('eva', dict(qkv_fused=True)), ('swin_transformer_v2', {})])
def test_layers_whose_weight_is_read_instead_of_called_are_refused(name, options):
    """An adapter there would learn nothing: the attention puts biases of its own beside the weight."""
    timm = pytest.importorskip('timm')
    module = getattr(timm.models, name)
    make = dict(beit=lambda: module.Beit, eva=lambda: module.Eva, swin_transformer_v2=lambda: module.SwinTransformerV2)
    size = dict(img_size=16, patch_size=4, num_classes=2)
    small = dict(depths=(1,), num_heads=(2,), embed_dim=8, window_size=2) if name == 'swin_transformer_v2' else \
        dict(depth=1, num_heads=2, embed_dim=16)
    model = make[name]()(**size, **small, **options)
    at = 'layers.*.blocks.*.attn' if name == 'swin_transformer_v2' else 'blocks.*.attn'
    with pytest.raises(ValueError, match=r'attn\.qkv.*reads the weight of this layer beside q_bias and v_bias'):
        expand(model, dict(type='LinearAdapter', at=f'{at}.qkv'))
    expand(model, dict(type='LinearAdapter', at=f'{at}.proj', position='after'))
    model.train()(torch.randn(2, 3, 16, 16)).square().mean().backward()
    adapters = [m for m in model.modules() if isinstance(m, LinearAdapter)]
    assert adapters and all(m.adapter.up.weight.grad is not None for m in adapters)


def test_an_attention_without_biases_of_its_own_is_no_obstacle():
    timm = pytest.importorskip('timm')
    model = timm.models.beit.Beit(img_size=16, patch_size=4, depth=1, num_heads=2, embed_dim=16, num_classes=2,
                                  qkv_bias=False)
    expand(model, dict(type='LinearAdapter', at='blocks.*.attn.qkv'))
    model.train()(torch.randn(2, 3, 16, 16)).square().mean().backward()
    assert model.blocks[0].attn.qkv.adapter.up.weight.grad.abs().sum() > 0
