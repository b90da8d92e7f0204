"""State-space mixers against the recurrence and the sum that define them; streaming, fusing, composition, mistakes."""
import copy
import math

import pytest
import torch
from torch import nn
from toys import make_model, train_steps

from ewa3d import attach_ewa, expand, fuse
from ewa3d.fusing import plain_config
from ewa3d.layers import ssm_kernels
from ewa3d.layers.block import Attention, Block, Mlp
from ewa3d.layers.ssm import S4, S4D, LongConvolution, convolve, state_space_parameters
from ewa3d.layers.ssm_kernels import (
    INITS,
    DiagonalKernel,
    DPLRKernel,
    geometric_sum,
    hippo_legs,
    legs_spectrum,
)
from ewa3d.registry import MODELS

EXACT = dict(rtol=0, atol=1e-12)


@pytest.fixture
def double():
    """Parameters are made in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mixers(**options):
    return [S4D(6, 8, **options).double(), S4(6, 8, **{'length': 11, **options}).double()]


# ---- kernels --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('length', [1, 2, 5, 16, 17, 40])
def test_sum_of_powers_is_the_sum_of_powers(length):
    weight = torch.randn(2, 3, 4, dtype=torch.complex128, requires_grad=True)
    log_base = torch.complex(-torch.rand(3, 4).double(), torch.randn(3, 4).double()).requires_grad_()
    got = geometric_sum(weight, log_base, length)
    powers = torch.stack([torch.exp(log_base) ** i for i in range(length)], -1)
    expected = torch.einsum('rhn,hnl->rhl', weight, powers).real
    torch.testing.assert_close(got, expected, **EXACT)
    seed = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), [weight, log_base]) for y in (got, expected))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('init', INITS)
@pytest.mark.parametrize('rule', ['zoh', 'bilinear'])
def test_diagonal_kernel_is_the_dense_sum(double, init, rule):
    kernel = DiagonalKernel(3, 6, 2, init, rule)
    A = torch.complex(-kernel.log_A_real.exp(), kernel.A_imag)
    dt = kernel.log_dt.exp()[:, None]
    if rule == 'zoh':
        power, B = torch.exp(dt * A), (torch.exp(dt * A) - 1) / A
    else:
        power, B = (1 + dt * A / 2) / (1 - dt * A / 2), dt / (1 - dt * A / 2)
    C = torch.view_as_complex(kernel.C)
    expected = torch.stack([2 * (C * B * power ** i).sum(-1).real for i in range(23)], -1)
    torch.testing.assert_close(kernel(23), expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(kernel(5), expected[..., :5], rtol=0, atol=1e-13)


def dense_system(kernel: DPLRKernel):
    """``A``, ``B`` ``(H, N, N)`` and ``(H, N)`` by the definition, one channel after the other."""
    A, B = [], []
    for h in range(kernel.dim):
        group = h * kernel.num_ssm // kernel.dim
        poles = torch.complex(-kernel.log_A_real[group].exp(), kernel.A_imag[group])
        poles, P, b = (torch.cat([v, v.conj()]) for v in (poles, *(torch.view_as_complex(p[group])
                                                                   for p in (kernel.P, kernel.B))))
        A.append(torch.diag(poles) - torch.outer(P, P.conj()))
        B.append(b)
    dt, one = kernel.log_dt.exp(), torch.eye(kernel.d_state)
    inverse = [torch.linalg.inv(one - dt[h] / 2 * A[h]) for h in range(kernel.dim)]
    return [inverse[h] @ (one + dt[h] / 2 * A[h]) for h in range(kernel.dim)], \
        [inverse[h] @ B[h] * dt[h] for h in range(kernel.dim)]


@pytest.mark.parametrize(('dim', 'states', 'size', 'directions', 'num_ssm'), [(3, 6, 16, 1, 1), (4, 4, 7, 2, 2),
                                                                              (2, 2, 1, 1, 1)])
def test_s4_kernel_is_dense_matrix_powers(double, dim, states, size, directions, num_ssm):
    kernel = DPLRKernel(dim, states, directions, size, num_ssm)
    A, B = dense_system(kernel)
    learnt = kernel.readout()
    learnt = torch.cat([learnt, learnt.conj()], -1)
    one = torch.eye(states)
    expected = torch.zeros(directions, dim, 3 * size)
    for r in range(directions):
        for h in range(dim):
            C = torch.linalg.solve((one - torch.linalg.matrix_power(A[h], size)).T, learnt[r, h])
            for i in range(3 * size):
                expected[r, h, i] = (C @ torch.linalg.matrix_power(A[h], i) @ B[h]).real
    torch.testing.assert_close(kernel(size), expected[..., :size], **EXACT)
    torch.testing.assert_close(kernel(3 * size), expected, rtol=0, atol=1e-11)  # longer than its own length
    torch.testing.assert_close(kernel(1), expected[..., :1], **EXACT)
    for gradient in torch.autograd.grad(kernel(3 * size).square().sum(), list(kernel.parameters())):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_gradients_of_the_kernels(double):
    for kernel in (DiagonalKernel(2, 4), DPLRKernel(2, 4, length=6)):
        names = [name for name, _ in kernel.named_parameters()]

        def run(*values, kernel=kernel, names=names):
            return torch.func.functional_call(kernel, dict(zip(names, values)), (5,))

        torch.autograd.gradcheck(run, tuple(p.detach().clone().requires_grad_() for p in kernel.parameters()))


@pytest.mark.parametrize('most', [1, 40, 1000])
def test_a_part_of_the_frequencies_at_a_time(double, monkeypatch, most):
    kernel = DPLRKernel(3, 4, directions=2, length=33)
    whole = kernel(33)
    wanted = torch.autograd.grad(whole.square().sum(), list(kernel.parameters()))
    monkeypatch.setattr(ssm_kernels, 'MOST_QUOTIENTS', most)
    torch.testing.assert_close(kernel(33), whole, **EXACT)
    for found, gradient in zip(torch.autograd.grad(kernel(33).square().sum(), list(kernel.parameters())), wanted):
        torch.testing.assert_close(found, gradient, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(kernel(20), whole[..., :20], **EXACT)


def test_hippo_is_normal_plus_rank_one():
    A, _ = hippo_legs(8)
    P = (torch.arange(8, dtype=torch.float64) + 0.5).sqrt()
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(skew, -skew.T, rtol=0, atol=1e-13)
    assert A[3, 1] == pytest.approx(-math.sqrt(7 * 3)) and A[2, 2] == -3 and A[1, 2] == 0
    poles, P, _ = (torch.cat([v, v.conj()]) for v in legs_spectrum(8))
    eigenvalues = torch.linalg.eigvals(torch.diag(poles) - torch.outer(P, P.conj())).real.sort().values
    torch.testing.assert_close(eigenvalues, -torch.arange(8, 0, -1, dtype=torch.float64), rtol=0, atol=1e-8)


def test_starting_points():
    """S4D-Lin, S4D-Inv, S4D-Real, S4D-LegS by their formulas."""
    n = torch.arange(3)
    for init, real, imag in (('lin', -0.5, math.pi * n), ('inv', -0.5, 6 / math.pi * (6 / (2 * n + 1) - 1)),
                             ('real', -(n + 1.), 0 * n)):
        poles = DiagonalKernel(2, 6, init=init).poles()
        torch.testing.assert_close(poles.real, torch.as_tensor(real).expand(2, 3).float())
        torch.testing.assert_close(poles.imag, imag.expand(2, 3).float())
    torch.testing.assert_close(DiagonalKernel(2, 6, init='legs').poles()[0].imag, legs_spectrum(6)[0].imag.float())
    log_dt = DiagonalKernel(500, 2).log_dt
    assert math.log(1e-3) <= log_dt.min() and log_dt.max() <= math.log(0.1) and log_dt.std() > 1


# ---- mixers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('L', [1, 2, 9])
@pytest.mark.parametrize('directions', [1, 2])
def test_convolution_is_the_sum(L, directions):
    u, kernel = torch.randn(2, 3, L, dtype=torch.float64), torch.randn(directions, 3, L, dtype=torch.float64)
    expected = torch.zeros_like(u)
    for t in range(L):
        for s in range(L):
            if s <= t:
                expected[..., t] += kernel[0, :, t - s] * u[..., s]
            elif directions == 2:
                expected[..., t] += kernel[1, :, s - t] * u[..., s]
    torch.testing.assert_close(convolve(u, kernel), expected, **EXACT)
    for wanted in ((True, True), (True, False), (False, True)):
        torch.autograd.gradcheck(convolve, tuple(x.clone().requires_grad_(w) for x, w in zip((u, kernel), wanted)))


@pytest.mark.parametrize('which', [0, 1], ids=['S4D', 'S4'])
def test_streaming_is_the_convolution(which):
    mixer = mixers()[which].eval()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    state, outputs = mixer.initial_state(2), []
    for token in x.unbind(1):
        y, state = mixer.step(token, state)
        outputs.append(y)
    expected = mixer(x)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=0, atol=1e-11)
    seed = torch.randn_like(expected)
    wanted = [x, *(mixer.parameters() if which == 0 else ())]  # S4 streams without learning
    for a, b in zip(*(torch.autograd.grad((y * seed).sum(), wanted) for y in (torch.stack(outputs, 1), expected))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('which', [0, 1], ids=['S4D', 'S4'])
def test_causal_and_not(which):
    x = torch.randn(1, 7, 6, dtype=torch.float64)
    later = x.clone()
    later[:, 4:] += 1
    causal, both = mixers()[which].eval(), mixers(bidirectional=True)[which].eval()
    torch.testing.assert_close(causal(x)[:, :4], causal(later)[:, :4], **EXACT)
    assert (causal(x)[:, 4:] - causal(later)[:, 4:]).abs().min() > 0
    assert (both(x)[:, 0] - both(later)[:, 0]).abs().max() > 1e-6
    with torch.no_grad():
        both.kernel.C[1] = both.kernel.C[0]  # the same in both directions
    torch.testing.assert_close(both(x.flip(1)), both(x).flip(1), **EXACT)


@pytest.mark.parametrize('which', [0, 1], ids=['S4D', 'S4'])
def test_the_kernel_is_single_precision_under_autocast(which):
    mixer, x = mixers(bidirectional=True)[which].float().eval(), torch.randn(2, 9, 6)
    seen = []
    handle = mixer.kernel.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        low = mixer(x)
    expected = mixer(x)
    handle.remove()
    assert seen[0].dtype == torch.float32 and torch.equal(*seen)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.02, atol=0.02)
    assert copy.deepcopy(mixer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_dropout_takes_whole_channels():
    mixer = S4D(5, 4, dropout=0.5).train()
    seen = []
    mixer.output_linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    mixer(torch.randn(3, 50, 5))
    dropped = (seen[0] == 0).all(1)
    assert dropped.any() and not dropped.all() and torch.equal(dropped, (seen[0] == 0).any(1))


# ---- expand and fuse ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['S4D', 'S4'])
@pytest.mark.parametrize('bidirectional', [True, False])
def test_fused_is_exact_and_serves_shorter_sequences(kind, bidirectional):
    model = nn.Sequential(Block(8, 2)).double()
    rule = dict(type=kind, at='0.attn', d_state=4, length=9, bidirectional=bidirectional, dropout=0.1)
    expand(model, rule)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    train_steps(model, x)
    before = [model.eval()(x), model(x[:, :4])]
    state = copy.deepcopy(model)
    report = fuse(model)
    assert [row.status for row in report] == ['fused'] and type(model[0].attn) is LongConvolution
    for old, new in zip(before, (model(x), model(x[:, :4]))):
        torch.testing.assert_close(new, old, **EXACT)
    with pytest.raises(ValueError, match='10 tokens is longer than the precomputed kernel, which is of length=9'):
        model(torch.randn(1, 10, 8, dtype=torch.float64))
    state(torch.randn(1, 10, 8, dtype=torch.float64))  # before fusing, any length
    built = nn.Sequential(Block(8, 2)).double().eval()
    expand(built, dict(rule, fused=True))
    built.load_state_dict(model.state_dict())
    assert torch.equal(built(x), model(x))
    train_steps(model, x)


def test_without_a_length_it_stays():
    model = nn.Sequential(Block(8, 2)).eval()
    expand(model, dict(type='S4D', at='0.attn', d_state=4))
    assert [row.status for row in fuse(model)] == ['kept'] and type(model[0].attn) is S4D
    assert type(model[0].attn.fuse(length=5)) is LongConvolution


def test_the_plain_config_builds_the_fused_form():
    model, _, x = make_model('timm ViT')
    rule = dict(type='S4D', at='blocks.*.attn', d_state=4, length=5)
    expand(model, [rule])
    fuse(model.eval())
    cfg = plain_config(dict(model=dict(expand=[rule])), model)
    assert cfg['model']['expand'] == [dict(rule, fused=True)]
    again, *_ = make_model('timm ViT')
    expand(again, cfg['model']['expand'])
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model(x))


def test_the_plain_config_keeps_a_mixer_without_a_length():
    model, *_ = make_model('timm ViT')
    rule = dict(type='S4D', at='blocks.*.attn', d_state=4)
    expand(model, [rule])
    fuse(model.eval())
    assert plain_config(dict(model=dict(expand=[rule])), model)['model']['expand'] == [rule]


@pytest.mark.parametrize('kind', ['S4D', 'S4'])
def test_mixer_and_averaged_experts(kind):
    """A state space in place of attention and EWA in place of the FFN."""
    model, _, x = make_model('timm ViT')
    expand(model, [dict(type=kind, at='blocks.*.attn', d_state=4, length=5),
                   dict(type='EWAFFN', at='blocks.*.mlp', num_experts=3)])
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    attach_ewa(optimizer, model, share_rate=0.3, total_steps=4)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    before = model.eval()(x)
    assert {row.status for row in fuse(model)} == {'fused'}
    torch.testing.assert_close(model(x), before, **EXACT)


def test_a_point_classifier_learns_its_order():
    tokenizer = dict(type='PointPatchEmbed', num_groups=6, group_size=4, widths=(8, 12, 16), pos_dim=8)
    backbone = dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=12, depth=2, num_heads=2,
                    order=['hilbert', 'z'], drop_path_rate=0.)
    model = MODELS.build(dict(type='TaskModel', backbone=backbone, neck=dict(type='TokenPool'),
                              head=dict(type='ClsHead', num_classes=3, hidden=8, dropout=0.),
                              expand=[dict(type='S4D', at='backbone.blocks.*.attn', d_state=4, length=13),
                                      dict(type='EWAFFN', at='backbone.blocks.*.mlp')])).double()
    points = torch.randn(3, 20, 3, dtype=torch.float64)
    train_steps(model, points)
    assert all(p.grad is not None for p in model.parameters())
    before = model.eval()(points)
    fuse(model)
    torch.testing.assert_close(model(points), before, **EXACT)


def test_parameters_with_a_rate_of_their_own():
    model = nn.ModuleList([S4D(4, 4, bidirectional=True), nn.Linear(4, 4), S4(4, 4)])
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in state_space_parameters(model)] == [
        f'{i}.kernel.{name}' for i, own in ((0, ('log_dt', 'log_A_real', 'A_imag')),
                                            (2, ('log_dt', 'log_A_real', 'A_imag', 'P', 'B'))) for name in own]


# ---- mistakes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(('cls', 'options', 'error', 'message'), [
    (S4D, dict(d_state=7), ValueError, 'd_state=7 must be even'),
    (S4D, dict(d_state=0), ValueError, 'd_state must be at least 2'),
    (S4D, dict(d_state=4.), TypeError, 'd_state must be an integer'),
    (S4D, dict(init='linear'), ValueError, "init='linear': did you mean 'lin'"),
    (S4D, dict(discretization='euler'), ValueError, "discretization='euler'"),
    (S4D, dict(dt_min=0.), ValueError, 'dt_min must lie in'),
    (S4D, dict(dt_min=0.2), ValueError, 'dt_min=0.2 is larger than dt_max=0.1'),
    (S4D, dict(dropout=1.), ValueError, 'dropout must lie in'),
    (S4D, dict(length=0), ValueError, 'length must be at least 1'),
    (S4, dict(length='long'), TypeError, 'length must be an integer'),
    (S4, dict(num_ssm=3), ValueError, 'dim=4 cannot be split among num_ssm=3')])
def test_settings_out_of_range(cls, options, error, message):
    with pytest.raises(error, match=message):
        cls(4, **options)


def test_mistakes_in_use():
    mixer = S4D(4, 4)
    for shape in ((2, 5, 3), (2, 0, 4), (5, 4)):
        with pytest.raises(ValueError, match=r'tokens \(B, L, 4\) with L >= 1 expected'):
            mixer(torch.randn(shape))
    with pytest.raises(ValueError, match='takes no attn_mask'):
        mixer(torch.randn(1, 5, 4), attn_mask=torch.ones(5, 5))
    mixer(torch.randn(1, 5, 4), is_causal=True)
    both = S4D(4, 4, bidirectional=True)
    with pytest.raises(ValueError, match='is_causal=True needs bidirectional=False'):
        both(torch.randn(1, 5, 4), is_causal=True)
    with pytest.raises(ValueError, match='streaming needs bidirectional=False'):
        both.initial_state(1)
    with pytest.raises(ValueError, match='one token of every stream'):
        mixer.step(torch.randn(3, 4), mixer.initial_state(2))


@pytest.mark.parametrize(('name', 'wanted'), [('swin_transformer', 'mask'), ('swin_transformer_v2', 'mask'),
                                              ('eva', 'rope'), ('beit', 'shared_rel_pos_bias')])
def test_attentions_that_take_more_than_tokens(name, wanted):
    timm = pytest.importorskip('timm')
    module = getattr(timm.models, name)
    if name.startswith('swin'):
        attn = module.WindowAttention(8, num_heads=2, window_size=(2, 2))
    else:
        attn = module.EvaAttention(8, 2, norm_layer=nn.LayerNorm) if name == 'eva' else module.Attention(8, 2)
    with pytest.raises(TypeError, match=rf"'0'.*called as attn\(x\); \w+ takes {wanted}"):
        expand(nn.Sequential(attn), dict(type='S4D', at='0'))


def test_options_of_an_attention_are_no_obstacle():
    class Own(Attention):
        def forward(self, x, return_weights=False, **kwargs):
            return super().forward(x)

    assert type(S4D.expand(Own(8, 2), d_state=4)) is S4D


def test_mistakes_in_rules():
    model = nn.ModuleDict(dict(attn=Attention(8, 2), other=nn.MultiheadAttention(8, 2), norm=nn.LayerNorm(8),
                               mlp=Mlp(8)))
    for at, message in (('other', 'MultiheadAttention returns a tuple'), ('norm', 'LayerNorm has no linear layer')):
        with pytest.raises(TypeError, match=message):
            expand(model, dict(type='S4D', at=at))
    with pytest.raises(ValueError, match='fused=True needs the length'):
        expand(model, dict(type='S4D', at='attn', fused=True))
    with pytest.raises(TypeError, match="unknown key 'state'; did you mean 'd_state'"):
        expand(model, dict(type='S4', at='attn', state=4))
