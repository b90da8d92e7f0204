"""Stacked experts: the partition, the products, EWAFFN against a naive loop, loading, options, surroundings."""
import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from toys import FFNS, HandWritten, make_ffn, scramble

from ewa3d.layers import experts
from ewa3d.layers.block import Mlp
from ewa3d.layers.experts import EWAFFN, iter_experts
from ewa3d.layers.partition import expert_layer_norm, expert_linear, uniform_partition

SCOPES = ('batch', 'shared', 'sample')


# ---------------------------------------------------------------------------------------------------------------------
# The partition
# ---------------------------------------------------------------------------------------------------------------------
def _tokens_of(parts) -> list[torch.Tensor]:
    return [slots[slots < parts.num_tokens] for slots in parts.table()]


@pytest.mark.parametrize('scope', SCOPES)
@pytest.mark.parametrize('experts', [2, 3, 4, 7])
@pytest.mark.parametrize('shape', [(1, 5), (2, 5), (13, 5), (16, 5), (1, 1, 5), (4, 1, 5), (3, 13, 5), (2, 12, 5),
                                   (2, 3, 5, 5), (0, 5), (2, 0, 5), (0, 3, 5)])
def test_every_token_once_and_even_sizes(scope, experts, shape):
    parts = uniform_partition(shape, experts, scope)
    tokens = torch.tensor(shape[:-1]).prod().item()
    sizes = [len(t) for t in _tokens_of(parts)]
    assert torch.cat(_tokens_of(parts)).sort().values.tolist() == list(range(tokens))
    assert torch.equal(parts.order[parts.inverse], torch.arange(len(parts.order)))
    if scope == 'batch' or len(shape) == 2:
        assert max(sizes) - min(sizes) <= 1
        assert len(parts.order) == -(-tokens // experts) * experts
    else:  # even within each sample
        length = tokens // max(shape[0], 1)
        for sample in range(shape[0]):
            sizes = [((t >= sample * length) & (t < (sample + 1) * length)).sum() for t in _tokens_of(parts)]
            assert max(sizes) - min(sizes) <= 1


def test_shared_and_sample_scopes():
    for scope, alike in (('shared', True), ('sample', False)):
        parts = uniform_partition((3, 50, 4), 4, scope)
        owner = torch.empty(150, dtype=torch.long)
        for expert, tokens in enumerate(_tokens_of(parts)):
            owner[tokens] = expert
        owner = owner.view(3, 50)
        assert torch.equal(owner[0], owner[1]) is alike
        assert torch.equal(owner[1], owner[2]) is alike


@pytest.mark.parametrize('scope', SCOPES)
def test_no_expert_is_favoured(scope):
    """5 tokens a sample, 3 experts, 1500 draws: each token goes to each expert a third of the time (± 5 sigma)."""
    draws, samples, tokens, count = 1500, 2, 5, 3
    seen = torch.zeros(samples * tokens, count)
    for _ in range(draws):
        for expert, part in enumerate(_tokens_of(uniform_partition((samples, tokens, 1), count, scope))):
            seen[part, expert] += 1
    assert (seen.sum(1) == draws).all()
    assert (seen - draws / count).abs().max() < 5 * (draws * 2 / 9) ** 0.5


def test_partition_follows_the_default_generator():
    def draw():
        return uniform_partition((3, 7, 2), 4, 'sample').order

    torch.manual_seed(3)
    first, second = draw(), draw()
    torch.manual_seed(3)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize('tokens, count', [(12, 4), (13, 4), (15, 4), (1, 3), (2, 5)])
def test_dispatch_and_collect_against_plain_indexing(tokens, count):
    parts = uniform_partition((tokens, 3), count)
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    slots = parts.dispatch(x)
    padded = torch.cat([x, x.new_zeros(len(parts.order) - tokens, 3)])
    naive = padded[parts.order].view(count, -1, 3)
    assert torch.equal(slots, naive)
    weight = torch.randn_like(slots)
    out, naive_out = parts.collect(slots * weight), (naive * weight).view(-1, 3)[parts.inverse[:tokens]]
    assert torch.equal(out, naive_out)
    g = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, x, g)[0], torch.autograd.grad(naive_out, x, g)[0])
    assert torch.autograd.gradcheck(lambda t: parts.collect(parts.dispatch(t) ** 2), x)
    assert torch.autograd.gradgradcheck(lambda t: parts.collect(parts.dispatch(t) ** 2), x)


def test_gradient_of_padding_is_dropped():
    parts = uniform_partition((5, 2), 4)
    slots = torch.randn(4, 2, 2, requires_grad=True)
    parts.collect(slots).sum().backward()
    padding = (parts.table() >= 5)[..., None].expand(-1, -1, 2)
    assert (slots.grad[padding] == 0).all()
    assert (slots.grad[~padding] == 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Products
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype, autocast', [(torch.float64, False), (torch.float32, False), (torch.float32, True),
                                             (torch.bfloat16, False), (torch.float64, True)])
def test_expert_linear_against_a_loop(bias, dtype, autocast):
    x, w, b = (torch.randn(*s, dtype=dtype, requires_grad=True) for s in ((3, 6, 4), (3, 5, 4), (3, 5)))
    inputs = [x, w, b] if bias else [x, w]
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        fast = expert_linear(*inputs)
        naive = torch.stack([nn.functional.linear(*args) for args in zip(*(t.unbind(0) for t in inputs))])
    assert fast.dtype == naive.dtype
    g = torch.randn_like(fast)
    tolerance = dict(rtol=2e-2, atol=2e-2) if fast.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(fast, naive, **tolerance)
    for a, c in zip(torch.autograd.grad(fast, inputs, g), torch.autograd.grad(naive, inputs, g)):
        assert a.dtype == c.dtype
        torch.testing.assert_close(a, c, **tolerance)


def test_expert_linear_derivatives():
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3, 4), (2, 3)))
    assert torch.autograd.gradcheck(expert_linear, (x, w, b))
    assert torch.autograd.gradgradcheck(expert_linear, (x, w, b))
    assert torch.autograd.gradcheck(lambda t: expert_linear(t, w.detach(), None), x)


def test_expert_layer_norm_against_a_loop():
    x, w, b = (torch.randn(*s, dtype=torch.float64) for s in ((3, 6, 4), (3, 4), (3, 4)))
    naive = torch.stack([nn.functional.layer_norm(x[i], (4,), w[i], b[i], 1e-3) for i in range(3)])
    torch.testing.assert_close(expert_layer_norm(x, (4,), w, b, 1e-3), naive)


# ---------------------------------------------------------------------------------------------------------------------
# EWAFFN
# ---------------------------------------------------------------------------------------------------------------------
def _naive(module: EWAFFN, plain: nn.Module, x: torch.Tensor, parts) -> torch.Tensor:
    """One token at a time through the plain FFN with its expert's weights."""
    rows, out = x.reshape(-1, x.shape[-1]), [None] * parts.num_tokens
    stacked = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for expert, tokens in enumerate(_tokens_of(parts)):
        for token in tokens.tolist():
            state = {name: tensor[expert] for name, tensor in stacked.items()}
            out[token] = functional_call(plain, state, (rows[None, token],))[0]
    return torch.stack(out).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize('name', [name for name in FFNS if name != 'batch norm'])
@pytest.mark.parametrize('shape', [(13, 12), (2, 8, 12), (1, 3, 3, 12), (1, 12)])
def test_training_forward_and_gradients(name, shape, monkeypatch):
    plain = make_ffn(name)
    module = EWAFFN.expand(plain, num_experts=3, partition='sample')
    scramble(module)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    parts = uniform_partition(x.shape, 3, 'sample')
    monkeypatch.setattr(experts, 'uniform_partition', lambda *_: parts)
    out, naive = module(x), _naive(module, plain, x, parts)
    torch.testing.assert_close(out, naive, rtol=0, atol=1e-12)
    g, inputs = torch.randn_like(out), [x] + [p for p in module.parameters() if p.requires_grad]
    ours, theirs = torch.autograd.grad(out, inputs, g), torch.autograd.grad(naive, inputs, g)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_which_layouts_are_fast():
    fast = {name for name in FFNS if EWAFFN.expand(make_ffn(name)).fast}
    assert {'ours', 'ours, norm, no bias', 'sequential', 'timm Mlp', 'torchvision MLPBlock'} <= fast
    assert not {'hand-written', 'batch norm', 'timm SwiGLU', 'timm GluMlp'} & fast


def test_unknown_code_is_not_fast():
    class Odd(Mlp):
        def forward(self, x):
            return super().forward(x) * 2

    hooked = Mlp(4, 8)
    hooked.act.register_forward_hook(lambda module, args, output: output * 2)
    patched = Mlp(4, 8)
    patched.act.forward = torch.tanh
    parametrized = Mlp(4, 8)
    nn.utils.parametrizations.weight_norm(parametrized.fc1)
    for plain in (Odd(4, 8), hooked, patched, parametrized):
        module = EWAFFN.expand(plain)
        assert not module.fast
        x = torch.randn(6, 4)
        torch.testing.assert_close(module(x), plain(x))
        torch.testing.assert_close(module.eval()(x), plain(x))
        torch.testing.assert_close(module.fuse()(x), plain(x))


@pytest.mark.parametrize('name', list(FFNS))
def test_fused_is_bit_equal_to_eval(name):
    module = EWAFFN.expand(make_ffn(name, torch.float32), num_experts=3)
    scramble(module)
    x = torch.randn(2, 7, 12)
    module(x)
    assert torch.equal(module.eval()(x), module.fuse()(x))


@pytest.mark.parametrize('count', [2, 3, 5, 7])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_copies_average_to_themselves_exactly(count, dtype):
    plain = Mlp(12, 20).to(dtype).eval()
    module = EWAFFN.expand(plain, num_experts=count)
    x = torch.randn(4, 12).to(dtype)
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize('name', list(FFNS))
def test_eval_has_gradients(name):
    module = EWAFFN.expand(make_ffn(name), num_experts=3).eval()
    module(torch.randn(1, 5, 12, dtype=torch.float64)).sum().backward()
    for parameter in module.parameters():
        if parameter.requires_grad:
            for grad in parameter.grad:
                torch.testing.assert_close(grad, parameter.grad[0])


@pytest.mark.parametrize('name', [name for name in FFNS if name != 'batch norm'])
@pytest.mark.parametrize('tokens', [0, 1, 2])
def test_fewer_tokens_than_experts(name, tokens):
    module = EWAFFN.expand(make_ffn(name), num_experts=4)
    out = module(torch.randn(tokens, 12, dtype=torch.float64))
    assert len(out) == tokens
    out.sum().backward()
    for parameter in module.parameters():
        if parameter.requires_grad:
            busy = parameter.grad.reshape(4, -1).abs().sum(1).count_nonzero()
            assert busy <= tokens
            assert parameter.grad.isfinite().all()


def test_batch_norm_sees_only_its_tokens():
    """13 tokens on 4 experts: no padding in the statistics, each expert its own; the mean of them in eval."""
    module = EWAFFN.expand(make_ffn('batch norm'), num_experts=4)
    x = torch.randn(1, 13, 12, dtype=torch.float64)
    torch.manual_seed(5)
    parts = uniform_partition(x.shape, 4)
    torch.manual_seed(5)
    module(x)
    fc1 = module.fc1
    for expert, tokens in enumerate(_tokens_of(parts)):
        hidden = nn.functional.linear(x[0, tokens], fc1.weight[expert], fc1.bias[expert])
        torch.testing.assert_close(module.norm.running_mean[expert], 0.1 * hidden.mean(0))
    assert module.norm.num_batches_tracked.tolist() == [1] * 4
    fused = module.fuse()
    torch.testing.assert_close(fused.norm.running_mean, module.norm.running_mean.mean(0))
    assert fused.norm.num_batches_tracked == 1


def test_a_buffer_that_forward_assigns_anew_is_kept():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer('seen', torch.zeros(()))

        def forward(self, x):
            self.seen = self.seen + len(x)
            return self.fc(x)

    module = EWAFFN.expand(Counting(), num_experts=2)
    module(torch.randn(10, 3)), module(torch.randn(4, 3))
    assert module.seen.tolist() == [7, 7]


def test_tied_parameters_stay_tied():
    module = EWAFFN.expand(HandWritten(), num_experts=3)
    assert module.weight is module.tied.weight
    assert len(module.expert_parameters()) == len(list(HandWritten().parameters()))
    assert {len(p) for p in module.expert_parameters()} == {3}
    fused = module.fuse()
    assert fused.weight is fused.tied.weight


def test_dropout_and_modes_follow():
    module = EWAFFN.expand(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)), num_experts=2)
    assert (module(torch.randn(32, 4)) == 0).float().mean() > 0.3
    assert (module.eval()(torch.randn(32, 4)) == 0).sum() == 0

    class Functional(nn.Linear):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    module = EWAFFN.expand(Functional(4, 64))
    assert (module(torch.randn(32, 4)) == 0).float().mean() > 0.3
    assert (module.eval()(torch.randn(32, 4)) == 0).sum() == 0
    assert (module.train()(torch.randn(32, 4)) == 0).float().mean() > 0.3


@pytest.mark.parametrize('name', ['ours', 'torchvision MLPBlock', 'timm SwiGLU'])
def test_training_flops_are_the_plain_ones(name):
    def flops(module):
        with FlopCounterMode(display=False) as counter:
            module(torch.randn(2, 8, 12, requires_grad=True)).sum().backward()
        return counter.get_total_flops()

    plain = make_ffn(name, torch.float32)
    module = EWAFFN.expand(plain, num_experts=4)
    module(torch.randn(2, 8, 12))  # the first step tries whether an unknown FFN treats every token alone
    assert flops(module) == flops(plain) > 0


def test_expand_leaves_the_plain_module_alone():
    plain = HandWritten()
    state = copy.deepcopy(plain.state_dict())
    module = EWAFFN.expand(plain)
    scramble(module)
    module.train()(torch.randn(9, 12)).sum().backward()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    assert all(p.grad is None for p in plain.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# State dicts
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', list(FFNS))
def test_state_dict_has_the_plain_names(name):
    plain = make_ffn(name)
    module = EWAFFN.expand(plain, num_experts=3)
    state = module.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(value.shape == (3, *plain.state_dict()[key].shape) for key, value in state.items())
    scramble(module)
    other = EWAFFN.expand(make_ffn(name), num_experts=3)
    other.load_state_dict(module.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), module.state_dict().values()))


@pytest.mark.parametrize('assign', [False, True])
def test_plain_checkpoint_loads_strictly(assign):
    plain, module = HandWritten(), EWAFFN.expand(HandWritten(), num_experts=3)
    state = plain.state_dict()
    assert str(module.load_state_dict(state, assign=assign)) == '<All keys matched successfully>'
    assert state['out'].shape == (12, 20)  # the caller's dict is as it was
    for key, value in module.state_dict().items():
        assert all(torch.equal(expert, state[key]) for expert in value)
    with torch.no_grad():
        module.out[0].zero_()  # the experts do not share memory
    assert torch.equal(module.out[1], plain.out)


def test_other_number_of_experts_is_a_clear_error():
    state = nn.Sequential(EWAFFN.expand(Mlp(4, 8), num_experts=2)).state_dict()
    with pytest.raises(RuntimeError, match=r'0\.fc1\.weight has 2 experts in the checkpoint, the model has 3'):
        nn.Sequential(EWAFFN.expand(Mlp(4, 8), num_experts=3)).load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match='size mismatch'):
        EWAFFN.expand(Mlp(4, 8)).load_state_dict(Mlp(4, 9).state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kwargs, error, message', [
    (dict(num_experts=1), ValueError, 'at least 2, got 1'),
    (dict(num_experts=0), ValueError, 'at least 2'),
    (dict(num_experts=-3), ValueError, 'at least 2'),
    (dict(num_experts=2.0), TypeError, 'integer'),
    (dict(num_experts=True), TypeError, 'integer'),
    (dict(num_experts='4'), TypeError, 'integer'),
    (dict(partition='batches'), ValueError, "did you mean 'batch'"),
    (dict(init='copies'), ValueError, "did you mean 'copy'"),
    (dict(init_noise_std=-0.1), ValueError, 'init_noise_std'),
    (dict(init_noise_std=float('nan')), ValueError, 'init_noise_std'),
    (dict(expert_grad_scale='e'), ValueError, 'expert_grad_scale'),
])
def test_wrong_options(kwargs, error, message):
    with pytest.raises(error, match=message):
        EWAFFN.expand(Mlp(4, 8), **kwargs)


def test_wrong_modules():
    with pytest.raises(ValueError, match='GELU has no parameters'):
        EWAFFN.expand(nn.GELU())
    with pytest.raises(ValueError, match='already has experts'):
        EWAFFN.expand(EWAFFN.expand(Mlp(4, 8)))
    with pytest.raises(ValueError, match='lazy'):
        EWAFFN.expand(nn.LazyLinear(4))
    with pytest.raises(TypeError, match=r'nn\.Module'):
        EWAFFN.expand(lambda x: x)


def test_noise_leaves_the_mean():
    plain = Mlp(64, 128).double()
    plain.fc1.bias.requires_grad_(False)
    module = EWAFFN.expand(plain, num_experts=4, init_noise_std=0.01)
    deviation = module.fc1.weight - plain.fc1.weight
    assert deviation.std().item() == pytest.approx(0.01, rel=0.05)
    torch.testing.assert_close(module.fc1.weight.mean(0), plain.fc1.weight)
    assert torch.equal(module.fc1.bias, plain.fc1.bias.expand(4, -1))


def test_independent_experts():
    plain = Mlp(64, 128, norm_layer=nn.LayerNorm)
    nn.init.trunc_normal_(plain.fc1.weight, std=0.02)
    nn.init.zeros_(plain.fc1.bias)
    module = EWAFFN.expand(plain, num_experts=3, init='independent')
    assert torch.equal(module.fc1.weight[0], plain.fc1.weight)
    assert not torch.equal(module.fc1.weight[1], module.fc1.weight[2])
    for expert in (1, 2):
        assert not torch.isclose(module.fc1.weight[expert], plain.fc1.weight).all()
        assert module.fc1.weight[expert].std().item() == pytest.approx(plain.fc1.weight.std().item(), rel=1e-3)
    assert (module.fc1.bias == 0).all()
    assert (module.norm.weight == 1).all()
    with pytest.raises(ValueError, match=r'the FFN \(HandWritten\) does not have'):
        EWAFFN.expand(HandWritten(), init='independent')


@pytest.mark.parametrize('name', ['ours', 'hand-written', 'sequential'])
def test_grad_scale(name):
    plain, x = make_ffn(name), torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    grads = []
    for scale in ('none', 'E'):
        torch.manual_seed(1)
        module = copy.deepcopy(EWAFFN.expand(plain, num_experts=3, expert_grad_scale=scale))
        out = module(x)
        grads.append(torch.autograd.grad(out.square().sum(), [x] + [p for p in module.parameters() if p.requires_grad]))
    torch.testing.assert_close(grads[1][0], grads[0][0])  # what flows on is not scaled
    for scaled, bare in zip(grads[1][1:], grads[0][1:]):
        torch.testing.assert_close(scaled, 3 * bare)


def test_iter_experts():
    model = nn.Sequential(EWAFFN.expand(Mlp(4, 8)), nn.Linear(4, 4), nn.Sequential(EWAFFN.expand(Mlp(4, 8))))
    assert [name for name, _ in iter_experts(model)] == ['0', '2.0']
    assert not list(iter_experts(nn.Linear(2, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Surroundings
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['ours', 'hand-written', 'batch norm'])
def test_deepcopy_and_pickle_are_independent(name):
    module = EWAFFN.expand(make_ffn(name, torch.float32), num_experts=3)
    scramble(module)
    x = torch.randn(2, 6, 12)
    module.eval()
    before = module(x)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    scramble(module)
    module.train()
    for other in copies:
        assert torch.equal(other(x), before)
        assert not other.training
        other.train()(x).sum().backward()
        assert torch.equal(other.eval().fuse()(x), other(x))


@pytest.mark.parametrize('name', ['ours', 'timm SwiGLU'])
def test_a_wrong_dtype_is_an_error_as_in_the_plain_ffn(name):
    with pytest.raises(RuntimeError):
        EWAFFN.expand(make_ffn(name))(torch.randn(5, 12))


def test_to_moves_everything():
    module = EWAFFN.expand(HandWritten(), num_experts=2).to(torch.float64)
    assert module(torch.randn(5, 12, dtype=torch.float64)).dtype == torch.float64
    assert module.eval()(torch.randn(5, 12, dtype=torch.float64)).dtype == torch.float64
    assert {p.dtype for p in module.fuse().parameters()} == {torch.float64}
    assert EWAFFN.expand(Mlp(4, 8, device='meta')).fc1.weight.shape == (4, 8, 4)


@pytest.mark.parametrize('name', ['ours', 'timm SwiGLU', 'batch norm'])
@pytest.mark.parametrize('reentrant', [True, False])
def test_activation_checkpointing(name, reentrant):
    module = EWAFFN.expand(make_ffn(name), num_experts=3)
    scramble(module)
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (module, lambda t: checkpoint(module, t, use_reentrant=reentrant)):
        torch.manual_seed(2)
        module.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize('name', ['ours', 'torchvision MLPBlock', 'timm SwiGLU'])
def test_autocast(name):
    plain = make_ffn(name, torch.float32)
    module = EWAFFN.expand(plain)
    x = torch.randn(2, 7, 12, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        out, dense = module(x), plain(x)
        assert torch.equal(module.eval()(x), dense)
    assert out.dtype == dense.dtype == torch.bfloat16
    torch.testing.assert_close(out, dense, rtol=2e-2, atol=2e-2)
    out.sum().backward()
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize('scope', SCOPES)
def test_compiles_without_graph_breaks(scope):
    torch.compiler.reset()
    module = EWAFFN.expand(Mlp(8, 16), num_experts=3, partition=scope, expert_grad_scale='E')
    scramble(module)
    compiled = torch.compile(module, fullgraph=True, backend='aot_eager')
    x = torch.randn(2, 7, 8, requires_grad=True)
    grads = []
    for run in (module, compiled):
        torch.manual_seed(0)
        module.zero_grad()
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in module.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    module.eval()
    torch.testing.assert_close(compiled(x), module(x))
    torch.compiler.reset()
