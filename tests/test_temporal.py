"""STDHA: which frame a head reads, the rule at the ends of a clip, other attentions, mistakes."""
import copy

import pytest
import torch
from torch import nn

from ewa3d import attach_ewa, expand, fuse
from ewa3d.layers.adapter import LinearAdapter
from ewa3d.layers.block import Attention, Block
from ewa3d.layers.temporal import STDHA, bind_frames, shift_heads


def naive(attention: nn.Module, x, offsets, T: int):
    """Frame by frame and head by head; ``x`` (B·T, L, C)."""
    rows, H, D = [], attention.num_heads, attention.head_dim
    for b in range(len(x) // T):
        clip = x[b * T:(b + 1) * T]
        q, k, v = (y.unflatten(-1, (H, D)) for y in attention.qkv(clip).chunk(3, -1))  # (T, L, H, D)
        q, k = attention.q_norm(q), attention.k_norm(k)
        for t in range(T):
            heads = []
            for h, offset in enumerate(offsets):
                s = t + offset if 0 <= t + offset < T else t
                weights = (q[t, :, h] @ k[s, :, h].T / D ** 0.5).softmax(-1)
                heads.append(weights @ v[s, :, h])
            rows.append(attention.proj(torch.cat(heads, -1)))
    return torch.stack(rows)


@pytest.mark.parametrize('T', [1, 2, 3, 5])
@pytest.mark.parametrize('offsets', [[0, 0, 0], [-1, 1, 0], [1, 1, -2], [0, 4, -7], [3, 0, 3]])
def test_against_a_naive_twin(T, offsets):
    attention = STDHA(12, 3, offsets, num_frames=T, qkv_bias=True).double()
    x = torch.randn(2 * T, 4, 12, dtype=torch.float64, requires_grad=True)
    got, expected = attention(x), naive(attention, x, offsets, T)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    weights, leaves = torch.randn_like(got), [x, *attention.parameters()]
    for a, b in zip(torch.autograd.grad((got * weights).sum(), leaves),
                    torch.autograd.grad((expected * weights).sum(), leaves)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    clips = attention(x.unflatten(0, (2, T)))
    assert torch.equal(clips, got.unflatten(0, (2, T)))


def test_clips_do_not_see_each_other():
    attention = STDHA(8, 2, [-1, 1], num_frames=3).eval()
    x = torch.randn(6, 4, 8)
    other = x.clone()
    other[3:] = torch.randn(3, 4, 8)
    assert torch.equal(attention(x)[:3], attention(other)[:3])


def test_no_offsets_is_the_plain_attention():
    plain = Attention(12, 3, qkv_bias=True, qk_norm=True, scale_norm=True).eval()
    module = STDHA.expand(plain, [0, 0, 0], num_frames=2)
    x = torch.randn(4, 5, 12)
    assert torch.equal(module(x), plain(x))
    mask = torch.zeros(5, 5).masked_fill_(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(module(x, attn_mask=mask), module(x, is_causal=True))
    assert module.fuse() is module and not module.training
    assert list(module.state_dict()) == list(plain.state_dict())
    assert 'offsets=[0, 0, 0], num_frames=2' in repr(module)


@pytest.mark.parametrize(('heads', 'shift', 'long', 'right', 'offsets'), [
    (12, 12, 0, False, [-1, 1] + [0] * 10), (12, 12, 12, True, [-1, 1, -2, 2] + [0] * 8),
    (16, 8, 0, False, [-1, -1, 1, 1] + [0] * 12), (16, 8, 8, False, [-1, -1, 1, 1, -2, -2] + [0] * 10)])
def test_heads_are_the_shifted_channels_as_published(heads, shift, long, right, offsets):
    T, C = 5, heads * 4
    x = torch.randn(2, T, 3, C)
    expected, f = x.clone(), C // shift
    expected[:, 1:, :, :f] = x[:, :-1, :, :f]
    expected[:, :-1, :, f:2 * f] = x[:, 1:, :, f:2 * f]
    if long:
        g = C // long
        expected[:, 2:, :, 2 * f:2 * f + g] = x[:, :-2, :, 2 * f:2 * f + g]
        if right:
            expected[:, :-2, :, 2 * f + g:2 * f + 2 * g] = x[:, 2:, :, 2 * f + g:2 * f + 2 * g]
    got = shift_heads(x.unflatten(-1, (heads, 4)), offsets).flatten(-2)
    assert torch.equal(got, expected)


def test_timm_attention():
    timm = pytest.importorskip('timm')
    for options in ({}, dict(qkv_bias=True, qk_norm=True, norm_layer=nn.LayerNorm), dict(attn_head_dim=3)):
        plain = timm.layers.Attention(8, num_heads=2, **options).double()
        module = STDHA.expand(plain, [1, -1], num_frames=3)
        x = torch.randn(3, 4, 8, dtype=torch.float64)
        torch.testing.assert_close(module(x), naive(plain, x, [1, -1], 3), rtol=0, atol=1e-12)
        assert {k: v.shape for k, v in module.state_dict().items()} == {k: v.shape for k, v in
                                                                        plain.state_dict().items()}
    if 'gated' in timm.layers.Attention.__init__.__code__.co_varnames:
        with pytest.raises(TypeError, match=r'has .*gate'):
            STDHA.expand(timm.layers.Attention(8, 2, gated=True), [0, 0])


def test_flags_dtype_and_dropout_are_kept():
    plain = Attention(8, 2, attn_drop=0.5, proj_drop=0.25).to(torch.bfloat16)
    plain.qkv.weight.requires_grad_(False)
    module = STDHA.expand(plain, [1, 0], num_frames=2)
    assert module.training and module.qkv.weight.dtype == torch.bfloat16 and not module.qkv.weight.requires_grad
    assert (module.attn_drop.p, module.proj_drop.p) == (0.5, 0.25)
    assert module.qkv.weight is not plain.qkv.weight
    module(torch.randn(2, 3, 8).to(torch.bfloat16)).sum().backward()
    assert module.proj.weight.grad is not None


@pytest.mark.parametrize(('offsets', 'error', 'message'), [
    ([0], ValueError, 'are 1, and the attention has 2 heads'), ([0, 1, 2], ValueError, 'are 3'),
    ([0, 0.5], TypeError, 'list of integers'), ('ab', TypeError, 'list of integers'), (1, TypeError, 'list of'),
    ([True, 0], TypeError, 'list of integers')])
def test_wrong_offsets(offsets, error, message):
    with pytest.raises(error, match=message):
        STDHA(8, 2, offsets)
    with pytest.raises(error, match=message):
        STDHA.expand(Attention(8, 2), offsets)


def test_mistakes():
    with pytest.raises(ValueError, match='dim=8 cannot be split among num_heads=3'):
        STDHA(8, 3, [0, 0, 0])
    with pytest.raises(ValueError, match='num_frames must be at least 1'):
        STDHA(8, 2, [0, 0], num_frames=0)
    with pytest.raises(TypeError, match='takes an attention with the layers'):
        STDHA.expand(nn.MultiheadAttention(8, 2), [0, 0])
    with pytest.raises(TypeError, match='Linear has none'):
        STDHA.expand(nn.Linear(8, 8), [0, 0])
    with pytest.raises(ValueError, match=r'num_frames is not set.*pass \(B, T, L, C\)'):
        STDHA(8, 2, [0, 1])(torch.randn(2, 3, 8))
    with pytest.raises(ValueError, match='7 frames are no whole clips of num_frames=2'):
        STDHA(8, 2, [0, 1], num_frames=2)(torch.randn(7, 3, 8))


def test_bind_frames():
    model = nn.Sequential(STDHA(8, 2, [0, 1]), nn.Sequential(STDHA(8, 2, [0, 1], num_frames=3)))
    with pytest.raises(ValueError, match=r'1\.0 has num_frames=3, the backbone takes clips of num_frames=4'):
        bind_frames(copy.deepcopy(model), 4)
    with pytest.raises(ValueError, match='0 is an STDHA without num_frames, and the backbone has none either'):
        bind_frames(model, None)
    bind_frames(model, 3)
    assert model[0].num_frames == 3
    bind_frames(model[1], None)  # it was told by its rule


@pytest.mark.parametrize('order', [0, 1])
def test_with_adapters_and_experts(order):
    """Adapters before or after STDHA, with EWA in the FFN, give one plain block with STDHA."""
    block = nn.Sequential(Block(8, 2, 2., qkv_bias=True)).double()
    keys, x = list(block.state_dict()), torch.randn(6, 4, 8, dtype=torch.float64)
    rules = [dict(type='STDHA', at='*.attn', offsets=[-1, 1], num_frames=3),
             dict(type='LinearAdapter', at='*.attn.qkv', rank=2),
             dict(type='LinearAdapter', at='*.attn.proj', position='after', rank=2)]
    shifted = copy.deepcopy(block)
    expand(shifted, rules[0])
    expand(block, [*(rules if order else rules[::-1]), dict(type='EWAFFN', at='*.mlp', num_experts=2)])
    assert sum(isinstance(m, LinearAdapter) for m in block.modules()) == 2
    torch.testing.assert_close(block.eval()(x), shifted.eval()(x), rtol=0, atol=1e-12)  # adapters and experts preserve
    optimizer = torch.optim.SGD(block.train().parameters(), lr=0.1)
    with attach_ewa(optimizer, block, total_steps=3):
        for _ in range(3):
            optimizer.zero_grad()
            block(x).square().mean().backward()
            optimizer.step()
    before = block.eval()(x)
    report = fuse(block)
    torch.testing.assert_close(block(x), before, rtol=0, atol=1e-12)
    assert [row.after for row in report if row.status == 'kept'] == ['STDHA'] and list(block.state_dict()) == keys
