import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewa3d.layers import block as module
from ewa3d.layers.block import Attention, Block, DropPath, Mlp, Pointwise, attend, pointwise


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


def test_attend_leaves_long_sequences_to_the_kernel(monkeypatch):
    """Weights that would take more memory than is worth it are not written out."""
    q, k, v = (torch.randn(2, 3, 6, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    seen, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(module.F, 'scaled_dot_product_attention', lambda *a, **o: seen.append(1) or kernel(*a, **o))
    monkeypatch.setattr(module, 'WRITTEN_OUT', 2 * 3 * 6 * 6)
    written = attend(q, k, v)
    assert not seen
    monkeypatch.setattr(module, 'WRITTEN_OUT', 2 * 3 * 6 * 6 - 1)
    torch.testing.assert_close(attend(q, k, v), written, atol=3e-2, rtol=3e-2)
    assert seen


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_attend_with_gradients_that_only_some_inputs_need(dtype):
    q, k, v = (torch.randn(1, 2, length, 4, dtype=dtype) for length in (3, 7, 7))  # cross attention
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(attend(q, k, v).double(), expected, atol=3e-2, rtol=3e-2)
    for tensor in (q, k, v):
        tensor.requires_grad_()
        out = attend(q, k, v)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=3e-2, rtol=3e-2)
        assert torch.autograd.grad(out.sum(), tensor)[0].isfinite().all()
        tensor.requires_grad_(False)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_attend_masks_and_dropout(dtype):
    q, k, v = (torch.randn(2, 2, 6, 4, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    out = attend(q, k, v, is_causal=True)
    torch.testing.assert_close(out, attend(q, k, v, attn_mask=mask))
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])
    ones = torch.ones_like(v)
    out = torch.stack([attend(q, k, ones, dropout_p=0.5).float() for _ in range(200)])
    assert out.std() > 0.1
    assert 0.9 < out.mean() < 1.1  # what stays is scaled up


def test_attention_mask():
    layer = Attention(8, num_heads=2)
    x = torch.randn(1, 4, 8)
    causal = layer(x, is_causal=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, attn_mask=mask), causal)
    torch.testing.assert_close(causal[:, :1], layer(x[:, :1]))


@pytest.mark.parametrize('heads', [5, 0])
def test_attention_refuses_heads_that_do_not_divide(heads):
    with pytest.raises(ValueError, match=f'num_heads.*{heads}'):
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


@pytest.mark.parametrize('options', [
    {}, dict(init_values=0.3), dict(scale_attn_norm=True, scale_mlp_norm=True, init_values=0.1), dict(qk_norm=True),
    dict(attn_layer='attn', proj_bias=False), dict(class_token=False, global_pool='avg', mlp_ratio=2.5)])
def test_our_block_in_a_timm_model(options):
    models = pytest.importorskip('timm.models')
    sizes = dict(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=3)
    theirs = models.VisionTransformer(**sizes, **options).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours = models.VisionTransformer(**sizes, **options, block_fn=Block).eval()
    assert all(type(block) is Block for block in ours.blocks)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), theirs(x))
    mask = torch.rand(2, 1, 1, theirs.pos_embed.shape[1]) < 0.7
    mask[..., 0] = True
    torch.testing.assert_close(ours.forward_features(x, attn_mask=mask), theirs.forward_features(x, attn_mask=mask))
    for mine, other in zip(torch.autograd.grad(ours(x).sum(), list(ours.parameters())[-8:]),
                           torch.autograd.grad(theirs(x).sum(), list(theirs.parameters())[-8:])):
        torch.testing.assert_close(mine, other)


def test_layers_of_timm_by_name_and_number():
    layers = pytest.importorskip('timm.layers')
    assert Block(24, 3, attn_layer=layers.DiffAttention, depth=5).attn.lambda_init != \
        Block(24, 3, attn_layer=layers.DiffAttention).attn.lambda_init
    with pytest.raises(ValueError, match="'diff'"):
        Block(24, 3, attn_layer='diff')


def test_layer_scale():
    block = Block(8, 2, init_values=1e-5)
    assert {name: tuple(p.shape) for name, p in block.named_parameters() if 'ls' in name} == \
        {'ls1.gamma': (8,), 'ls2.gamma': (8,)}
    torch.testing.assert_close(block.ls2.gamma, torch.full((8,), 1e-5))
    assert not [name for name, _ in Block(8, 2).named_parameters() if 'ls' in name]
    block.double().eval()
    nn.init.normal_(block.ls1.gamma), nn.init.normal_(block.ls2.gamma)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    y = x + block.attn(block.norm1(x)) * block.ls1.gamma
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)) * block.ls2.gamma)


@pytest.mark.parametrize('kwargs, error', [
    (dict(mlp_ratio=0), ValueError), (dict(mlp_ratio='abc'), TypeError), (dict(num_heads='abc'), TypeError),
    (dict(init_values='abc'), TypeError), (dict(drop_path=1.), ValueError), (dict(drop_path=-0.1), ValueError)])
def test_block_refuses(kwargs, error):
    (name, value), = kwargs.items()
    with pytest.raises(error, match=f'{name.replace("_", ".")}.*{value}'):
        Block(**{**dict(dim=12, num_heads=3), **kwargs})


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


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', [(5, 7, 4), (2, 1, 4), (1, 6, 4), (3, 5, 1), (9, 4), (2, 3, 5, 4), (0, 3, 4)])
def test_pointwise_is_the_linear_map(shape, dtype):
    """Patches in float32 take another kernel."""
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(6, 2 * shape[-1], dtype=dtype, requires_grad=True)
    bias = torch.randn(6, dtype=dtype, requires_grad=True)
    for b in (bias, None):
        leaves = [x, weight, *([b] if b is not None else [])]
        out, expected = (function(x, weight[:, ::2], b) for function in (pointwise, F.linear))
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(expected)
        for one, other in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
            torch.testing.assert_close(one, other)


def test_pointwise_under_autocast_compiled_and_without_onednn(monkeypatch):
    layer, x = Pointwise(4, 6), torch.randn(5, 7, 4)
    expected = F.linear(x, layer.weight, layer.bias)
    with torch.autocast('cpu', torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.transpose(0, 1)), expected.transpose(0, 1))  # not contiguous
    torch.testing.assert_close(torch.compile(layer, backend='eager', fullgraph=True)(x), expected)
    monkeypatch.setattr('ewa3d.layers.block.ONEDNN', False)
    assert torch.equal(layer(x), expected)
