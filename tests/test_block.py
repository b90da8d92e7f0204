import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewa3d.layers.block import Attention, Block, DropPath, Mlp, attend


def naive_attention(layer: Attention, x):
    """One query at a time, as in the paper."""
    B, L, C = x.shape
    D = C // layer.num_heads
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).split(C, -1)
    out = torch.zeros(B, L, C, dtype=x.dtype)
    for b in range(B):
        for h in range(layer.num_heads):
            part = slice(h * D, (h + 1) * D)
            for i in range(L):
                scores = torch.stack([q[b, i, part] @ k[b, j, part] for j in range(L)]) / D ** 0.5
                weights = scores.exp() / scores.exp().sum()
                out[b, i, part] = sum(weights[j] * v[b, j, part] for j in range(L))
    return F.linear(out, layer.proj.weight, layer.proj.bias)


@pytest.mark.parametrize('qkv_bias', [False, True])
def test_attention_forward_and_backward(qkv_bias):
    layer = Attention(12, num_heads=3, qkv_bias=qkv_bias).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    out, naive = layer(x), naive_attention(layer, x)
    torch.testing.assert_close(out, naive)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad((out * weight).sum(), leaves)
    for a, b in zip(grads, torch.autograd.grad((naive * weight).sum(), leaves)):
        torch.testing.assert_close(a, b)


def test_attend_in_low_precision_equals_the_kernel():
    """In bf16 with gradients the products are written out; the result is the kernel's."""
    q, k, v = (torch.randn(2, 3, 9, 8, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v)
    weight = torch.randn_like(expected)
    grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    out = attend(*(t.bfloat16() for t in (q, k, v)))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)
    for a, b in zip(torch.autograd.grad((out * weight).sum(), (q, k, v)), grads):
        torch.testing.assert_close(a.float(), b, atol=3e-2, rtol=3e-2)


def test_attention_mask():
    layer = Attention(8, num_heads=2)
    x = torch.randn(1, 4, 8)
    causal = layer(x, is_causal=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, attn_mask=mask), causal)
    torch.testing.assert_close(causal[:, :1], layer(x[:, :1]))


@pytest.mark.parametrize('heads', [5, 0])
def test_attention_refuses_heads_that_do_not_divide(heads):
    with pytest.raises(ValueError, match=f'dim=12.*num_heads={heads}'):
        Attention(12, num_heads=heads)


def test_block_is_prenorm_residual():
    block = Block(12, 3).double().eval()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    y = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y)))))


def test_names_and_numbers_are_timms():
    timm_vit = pytest.importorskip('timm.models.vision_transformer')
    theirs = timm_vit.Block(24, 4, qkv_bias=True).eval()
    ours = Block(24, 4, qkv_bias=True).eval()
    ours.load_state_dict(theirs.state_dict())
    for block in (ours, theirs):
        block.norm1.eps = block.norm2.eps = 1e-6
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), theirs(x))


def test_our_layers_in_a_timm_model():
    timm = pytest.importorskip('timm')
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=3, mlp_layer=Mlp,
                              attn_layer=Attention)
    theirs = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=3)
    assert type(model.blocks[0].mlp) is Mlp
    model.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x), atol=1e-5, rtol=1e-5)


def test_slots_of_the_block():
    class Nothing(nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.kwargs = kwargs

        def forward(self, x):
            return torch.zeros_like(x)

    block = Block(8, 2, mlp_ratio=3, mlp_layer=Nothing, attn_layer=Nothing)
    x = torch.randn(1, 4, 8)
    assert torch.equal(block(x), x)
    assert block.mlp.kwargs['hidden_features'] == 24 and block.attn.kwargs['num_heads'] == 2


def test_mlp_widths_dropout_and_norm():
    mlp = Mlp(6, 10, 4, drop=0.5, norm_layer=nn.LayerNorm, bias=False)
    assert [tuple(p.shape) for p in mlp.parameters()] == [(10, 6), (10,), (10,), (4, 10)]
    x = torch.randn(3, 6)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


def test_initialisation():
    block = Block(64, 4, qkv_bias=True)
    for name, p in block.named_parameters():
        if name.endswith('bias'):
            assert (p == 0).all(), name
        elif 'norm' in name:
            assert (p == 1).all(), name
        else:
            assert 0.015 < p.std() < 0.025, name


def test_drop_path():
    layer = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    out = layer(x)
    rows = out[:, 0, 0]
    torch.testing.assert_close(rows.unique(), torch.tensor([0., 4 / 3]))
    assert (out == rows[:, None, None]).all()  # a sample is kept or dropped as a whole
    assert 0.72 < (rows > 0).float().mean() < 0.78
    assert layer.eval()(x) is x
    assert DropPath(0.)(x) is x


@pytest.mark.parametrize('rate', [-0.1, 1., 1.5])
def test_drop_path_refuses(rate):
    with pytest.raises(ValueError, match=str(rate)):
        DropPath(rate)


def test_block_in_bf16_autocast_trains():
    block = Block(16, 4, drop_path=0.5)
    x = torch.randn(8, 5, 16, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        y = block(x)
    torch.testing.assert_close(block.eval()(x), block(x))
    y.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
