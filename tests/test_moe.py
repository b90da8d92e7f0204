"""Naive and residual mixtures against a loop over tokens, their losses in a model's dict, and what they refuse."""
import copy
import pickle

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn
from torch.func import functional_call
from toys import FFNS, make_ffn, scramble, train_steps

import ewa3d
from ewa3d import attach_ewa, expand, fuse, param_groups
from ewa3d.engine.averaging import average_
from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
from ewa3d.fusing import fuse_checkpoint
from ewa3d.layers.block import Mlp
from ewa3d.layers.moe import MoEFFN, begin_routing, routing_losses, routing_stats, to_dense
from ewa3d.layers.residual import ResidualMoEFFN
from ewa3d.layers.routing import capacity_of
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

BOTH = [MoEFFN, ResidualMoEFFN]


def expert_of(module, plain: nn.Module, i: int) -> dict[str, torch.Tensor]:
    """The tensors of expert ``i`` by the plain names, written out from the parameters."""
    if isinstance(module, MoEFFN):
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        return {name: tensors[name][i] for name in plain.state_dict(keep_vars=True)}
    own = dict(module.named_parameters())
    found = {}
    for name in dict(plain.named_parameters()):
        if f'residual.{name}' in own:
            found[name] = own[name] + own[f'residual.{name}'][i]
        else:
            found[name] = own[name] + own[f'residual.{name}_up'][i] @ own[f'residual.{name}_down'][i]
    return found


def naive(module, plain: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Token by token: softmax, the k best, gates that sum to one (or not), experts with a limited number of places."""
    tokens, router = x.reshape(-1, x.shape[-1]), module.router
    count, E, k = len(tokens), module.num_experts, router.top_k
    factor = module.capacity_factor if module.training else module.eval_capacity_factor
    capacity = count if factor is None else capacity_of(count, E, k, factor)
    probs = (tokens @ router.weight.T).softmax(-1)
    chosen = [sorted(range(E), key=lambda e: -float(row[e]))[:k] for row in probs]
    used, kept = [0] * E, set()
    for j in range(k):
        for t in range(count):
            e = chosen[t][j]
            if used[e] < capacity:
                used[e] += 1
                kept.add((t, j))
    outputs = []
    for t in range(count):
        total = sum(probs[t, e] for e in chosen[t]) if router.renorm else 1.
        y = 0.
        for j, e in enumerate(chosen[t]):
            out = functional_call(plain, expert_of(module, plain, e), tokens[t:t + 1])[0]
            y = y + (probs[t, e] / total * out if (t, j) in kept else out * 0)
        outputs.append(y)
    return torch.stack(outputs).reshape(*x.shape[:-1], -1)


def compare(module, plain, x, tolerance=1e-11):
    """Outputs, and the gradients of every parameter and of the input."""
    plain.train(module.training)
    x = x.clone().requires_grad_()
    weight = None
    results = []
    for run in (module, lambda x: naive(module, plain, x)):
        y = run(x)
        weight = torch.randn_like(y) if weight is None else weight
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        results.append((y, torch.autograd.grad((y * weight).sum(), inputs, allow_unused=True)))
    (y, grads), (z, others) = results
    torch.testing.assert_close(y, z, rtol=0, atol=tolerance)
    for grad, other in zip(grads, others):
        assert grad is not None  # unused experts as well: DDP waits for every parameter
        torch.testing.assert_close(grad, torch.zeros_like(grad) if other is None else other, rtol=0, atol=tolerance)


def build(cls, name='ours', **cfg):
    plain = make_ffn(name)
    module = cls.expand(plain, **cfg)
    scramble(module)
    return module.train(), plain


CASES = [dict(), dict(top_k=1), dict(top_k=1, gate_mode='raw'), dict(top_k=4), dict(top_k=4, capacity_factor=0.5),
         dict(gate_mode='raw'), dict(num_experts=9, top_k=2), dict(num_experts=9, top_k=9, capacity_factor=None),
         dict(capacity_factor=0.01), dict(capacity_factor=None), dict(capacity_factor=100., num_experts=3),
         dict(num_experts=2, top_k=2)]


@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('cfg', CASES, ids=str)
def test_against_a_loop_over_tokens(cls, cfg):
    module, plain = build(cls, **cfg)
    assert module.fast
    for shape in ((7, 12), (2, 3, 12), (1, 1, 12)):
        compare(module, plain, torch.randn(shape, dtype=torch.float64))
    module.eval()
    compare(module, plain, torch.randn(5, 12, dtype=torch.float64))


@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('name', [name for name in FFNS if name not in ('batch norm', 'hand-written')])
def test_every_ffn_against_a_loop(cls, name):
    module, plain = build(cls, name, num_experts=3, capacity_factor=1.)
    compare(module, plain, torch.randn(2, 4, 12, dtype=torch.float64))


def test_low_rank_residuals_against_a_loop():
    module, plain = build(ResidualMoEFFN, rank=3)
    compare(module, plain, torch.randn(9, 12, dtype=torch.float64))
    assert module.residual.fc1.weight_up.shape == (4, 20, 3) and module.residual.fc1.weight_down.shape == (4, 3, 12)
    assert module.residual.fc1.bias.shape == (4, 20)


@pytest.mark.parametrize('cls', BOTH)
def test_no_tokens(cls):
    for name in ('ours', 'timm SwiGLU'):
        module, _ = build(cls, name)
        y = module(torch.zeros(0, 12, dtype=torch.float64))
        assert y.shape == (0, 12)
        (y.sum() + sum(routing_losses(module).values())).backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize('name', ['batch norm', 'hand-written'])
def test_an_expert_with_one_token_trains(name):
    for cls in BOTH:
        module, _ = build(cls, name, num_experts=6, top_k=1)
        module(torch.randn(3, 12, dtype=torch.float64)[None]).sum().backward()
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('top_k', [1, 2, 3])
def test_starts_as_the_plain_ffn_where_nothing_is_dropped(cls, top_k):
    plain = make_ffn('ours')
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    module = cls.expand(plain, num_experts=3, top_k=top_k, capacity_factor=None, eval_capacity_factor=None)
    for mode in (True, False):
        torch.testing.assert_close(module.train(mode)(x), plain(x), rtol=0, atol=1e-14)


def test_dropped_tokens_give_zero_and_are_counted():
    module = MoEFFN.expand(make_ffn('ours'), num_experts=2, top_k=1, capacity_factor=0.5).train()
    with torch.no_grad():
        module.router.weight.zero_()
        module.router.weight[1] = -1.
    x = torch.rand(8, 12, dtype=torch.float64)  # all to expert 0, which has two places
    y = module(x)
    assert bool((y[:2] != 0).any()) and bool((y[2:] == 0).all())
    stats = routing_stats(module)
    assert float(stats['dropped']) == pytest.approx(75)
    assert float(stats['load_max']) == pytest.approx(2)


# ---- losses ---------------------------------------------------------------------------------------------------------
def test_losses_of_a_loop_of_ones_own():
    model = nn.Sequential(nn.Linear(12, 12), Mlp(12, 20), Mlp(12, 20))
    expand(model, dict(type='MoEFFN', at='*', index=[1, 2], z_weight=1e-3))
    x = torch.randn(5, 12)
    model.eval()(x)
    assert routing_stats(model) == {}
    model.train()(x)
    single = [0.01 * _balance(module, inputs) for module, inputs in _inputs(model, x)]
    losses = routing_losses(model)
    assert set(losses) == {'loss_balance', 'loss_router_z'}
    torch.testing.assert_close(losses['loss_balance'], sum(single))
    assert routing_stats(model) == {}  # taken
    sum(losses.values()).backward()
    assert model[1].router.weight.grad is not None


def _inputs(model, x):
    for layer in model:
        if isinstance(layer, MoEFFN):
            yield layer, x
        with torch.no_grad():
            x = layer(x)


def _balance(module, x):
    probs = (x @ module.router.weight.T).softmax(-1)
    load = torch.stack([(probs.topk(2).indices == i).float().sum() for i in range(4)]) / (2 * len(x))
    return 4 * (load * probs.mean(0)).sum()


def test_a_layer_at_two_places_adds_up_only_where_a_model_collects():
    module, _ = build(MoEFFN)
    x = torch.randn(5, 12, dtype=torch.float64)
    once = module(x) is not None and float(routing_losses(module)['loss_balance'])
    module(x), module(x)
    assert float(routing_losses(module)['loss_balance']) == pytest.approx(once)  # the last call
    begin_routing(module)
    module(x), module(x)
    stats = routing_stats(module)
    assert float(stats['loss_balance']) == pytest.approx(2 * once)
    assert float(stats['load_max']) <= 4


def task_config(*rules: dict, **kwargs) -> dict:
    return dict(
        type='TaskModel',
        backbone=dict(type='TokenEncoder', embed_dim=16, depth=4, num_heads=2, drop_path_rate=0.,
                      tokenizer=dict(type='PointPatchEmbed', num_groups=8, group_size=4, embed_dim=16,
                                     widths=(8, 8, 16))),
        neck=dict(type='TokenPool', mode='cls+max'),
        head=dict(type='ClsHead', form='linear', num_classes=4, dropout=0.),
        expand=[dict(dict(at='backbone.blocks.*.mlp', every=2), **rule) for rule in rules], **kwargs)


def task_model(*rules: dict, **kwargs) -> nn.Module:
    return MODELS.build(task_config(*rules, **kwargs))


def batch():
    return dict(inputs=dict(points=[torch.randn(64, 3) for _ in range(3)]),
                data_samples=[Sample(gt_label=torch.tensor(i)) for i in range(3)])


@pytest.mark.parametrize('kind', ['MoEFFN', 'ResidualMoEFFN'])
def test_losses_arrive_in_the_models_dict(kind):
    model = task_model(dict(type=kind, z_weight=1e-3)).train()
    data = model.data_preprocessor(batch(), True)
    losses = model(**data, mode='loss')
    assert {'loss_cls', 'loss_balance', 'loss_router_z', 'dropped', 'load_max'} <= set(losses)
    total, log = model.parse_losses(losses)
    assert float(total) == pytest.approx(float(sum(v for k, v in losses.items() if 'loss' in k)))
    assert 'dropped' in log
    parts = [module.routing for module in model.modules() if isinstance(module, (MoEFFN, ResidualMoEFFN))]
    assert parts == [None, None]
    assert not isinstance(model(data['inputs'], mode='tensor'), dict)
    assert 'loss_balance' in model(data['inputs'], data['data_samples'], 'loss')  # as a positional argument
    assert set(model.eval()(**data, mode='loss')) == {'loss_cls', 'acc'}


def test_training_step_moves_router_and_experts():
    model = task_model(dict(type='MoEFFN'))
    wrapper = OptimWrapper(torch.optim.AdamW(param_groups(model, 1e-2, 0.05)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train().train_step(batch(), wrapper)
    for name, parameter in model.named_parameters():
        if '.mlp.' in name:
            assert not torch.equal(parameter, before[name]), name


# ---- averaging, fusing, loading -------------------------------------------------------------------------------------
@pytest.mark.parametrize('cls', BOTH)
def test_the_hook_averages_experts_and_leaves_the_router(cls):
    model = nn.Sequential(cls.expand(make_ffn('ours'), num_experts=3))
    scramble(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    experts = [p.detach().clone() for p in model[0].expert_parameters()]
    others = {name: p.detach().clone() for name, p in model.named_parameters()
              if all(p is not e for e in model[0].expert_parameters())}
    assert '0.router.weight' in others
    rates = []
    with attach_ewa(optimizer, model, 0.3, 'constant', total_steps=4, end=0.5) as handle:  # "early EWA"
        for _ in range(4):
            model(torch.randn(5, 12, dtype=torch.float64)).sum().backward()
            rates.append(handle.rate)
            optimizer.step()
    assert rates == [0.3, 0.3, 0., 0.]
    for own, old in zip(model[0].expert_parameters(), experts):
        for _ in range(2):
            average_(old, 0.3)
        torch.testing.assert_close(own.detach(), old)
    for name, parameter in model.named_parameters():
        if name in others:
            assert torch.equal(parameter, others[name]), name


def test_low_rank_residuals_are_not_averaged():
    model = nn.Sequential(ResidualMoEFFN.expand(make_ffn('ours'), rank=2))
    with pytest.raises(ValueError, match='low-rank'):
        attach_ewa(torch.optim.SGD(model.parameters(), lr=0.1), model, 0.3, 'constant')


@pytest.mark.parametrize('cls', BOTH)
def test_fuse_keeps_it_and_says_so(cls):
    model = nn.Sequential(Mlp(12, 20), Mlp(12, 20))
    expand(model, dict(type=cls.__name__, at='*', last=1))
    report = fuse(model)
    assert [(row.name, row.status) for row in report] == [('1', 'kept')]
    assert isinstance(model[1], cls)


def test_a_kept_mixture_is_closed():
    """What is stacked inside a mixture that stays is not fused behind its back."""
    model = nn.Sequential(Mlp(12, 20))
    expand(model, [dict(type='RePaFFN', at='0'), dict(type='MoEFFN', at='0')])
    model.eval()
    x = torch.randn(5, 12)
    before = model(x)
    assert [row.status for row in fuse(model)] == ['kept']
    assert torch.equal(model(x), before)
    assert [row.before for row in to_dense(model)] == ['MoEFFN']
    assert type(model[0]).__name__ == 'RePaFFN'  # the mean FFN, which folds
    assert [row.after for row in fuse(model)] == ['FoldedFFN']


@pytest.mark.parametrize('rules', [[dict(type='MoEFFN')], [dict(type='ResidualMoEFFN')],
                                   [dict(type='RePaFFN'), dict(type='MoEFFN')],
                                   [dict(type='LinearAdapter', at='backbone.blocks.*.mlp.fc1'), dict(type='MoEFFN')]],
                         ids=lambda rules: rules[0]['type'])
def test_the_fuse_tool_keeps_a_mixture_and_what_is_in_it(rules, tmp_path):
    cfg = dict(model=task_config(*rules), default_hooks=dict(ewa=dict(type='EWAHook')))
    model = MODELS.build(copy.deepcopy(cfg['model']))
    scramble(model)
    write_checkpoint(tmp_path / 'a.pth', model.state_dict(), dict(cfg=cfg))
    report = fuse_checkpoint(tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert report.written and report.kept == 2
    plain = read_checkpoint(tmp_path / 'b.pth')['meta']['cfg']
    assert plain['model']['expand'] == cfg['model']['expand'] and plain['default_hooks'] == cfg['default_hooks']
    points = torch.randn(2, 64, 3)
    torch.testing.assert_close(ewa3d.build(plain, tmp_path / 'b.pth')(points), model.eval()(points))


def test_to_dense_on_request():
    model = nn.Sequential(Mlp(12, 20), Mlp(12, 20)).double()
    expand(model, [dict(type='MoEFFN', at='0'), dict(type='ResidualMoEFFN', at='1')])
    scramble(model)
    moe, residual = copy.deepcopy(list(model))
    assert torch.equal(residual.to_dense('core').fc1.weight, residual.fc1.weight)
    report = to_dense(model, 'mean')
    assert [row.status for row in report] == ['mean', 'mean'] and report.params_after < report.params_before
    assert all(type(layer) is Mlp for layer in model)
    torch.testing.assert_close(model[0].fc2.weight, moe.fc2.weight.mean(0))
    torch.testing.assert_close(model[1].fc2.bias, residual.fc2.bias + residual.residual.fc2.bias.mean(0))
    with pytest.raises(ValueError, match='no routed experts'):
        to_dense(model)
    expand(model, dict(type='MoEFFN', at='0'))
    with pytest.raises(ValueError, match=r"to_dense='core'.*mean"):
        to_dense(model, 'core')


def test_to_dense_of_a_mixture_itself_or_of_a_wrapped_model():
    """There is nothing that it could be put into: an error, and nothing is reported as done."""
    for cls in BOTH:
        mixture = cls.expand(Mlp(12, 20))
        with pytest.raises(ValueError, match=rf'{cls.__name__} is itself one.*model = model.to_dense'):
            to_dense(mixture)
    wrapped = nn.Sequential(nn.DataParallel(nn.Sequential(mixture)))
    with pytest.raises(ValueError, match=r'to_dense\(\) needs the unwrapped model.*DataParallel'):
        to_dense(wrapped)


@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize(('num_experts', 'top_k'), [(8, 1), (8, 2), (16, 2)])
def test_it_starts_as_the_plain_ffn_however_uneven_the_load(cls, num_experts, top_k):
    plain = Mlp(12, 20).double().eval()
    module = cls.expand(plain, num_experts=num_experts, top_k=top_k)
    x = torch.randn(12, dtype=torch.float64) + 0.01 * torch.randn(4, 25, 12, dtype=torch.float64)  # to the same experts
    torch.testing.assert_close(module(x), plain(x), rtol=0, atol=1e-12)


def test_a_mixture_of_one_stage_starts_the_next(tmp_path):
    """RMoE's pipeline: dense weights into the core, then the mixture's into a mixture."""
    dense = task_model(dict(type='EWAFFN'))
    fuse(dense)
    torch.save(dict(state_dict=dense.state_dict()), tmp_path / 'dense.pth')
    first = task_model(dict(type='ResidualMoEFFN', freeze_core=True), pretrained=str(tmp_path / 'dense.pth'))
    assert torch.equal(first.backbone.blocks[1].mlp.fc1.weight, dense.backbone.blocks[1].mlp.fc1.weight)
    x = torch.randn(2, 64, 3)
    torch.testing.assert_close(first.eval().extract(x), dense.eval().extract(x), rtol=1e-5, atol=1e-6)
    train_steps(first, x)
    torch.save(dict(state_dict=first.state_dict()), tmp_path / 'first.pth')
    second = task_model(dict(type='ResidualMoEFFN'), pretrained=str(tmp_path / 'first.pth'))
    assert not second.load_report.unexpected
    for (name, own), (_, other) in zip(second.named_parameters(), first.named_parameters()):
        assert torch.equal(own, other), name
    assert any(float(p.detach().abs().max()) > 0 for p in second.backbone.blocks[1].mlp.residual.parameters())
    with pytest.raises(ValueError, match='other shapes'):
        task_model(dict(type='ResidualMoEFFN', num_experts=6), pretrained=str(tmp_path / 'first.pth'))


def test_frozen_core_gets_no_gradient():
    module, _ = build(ResidualMoEFFN, freeze_core=True)
    module(torch.randn(5, 12, dtype=torch.float64)).sum().backward()
    assert all(p.grad is None for p in module.core_parameters())
    assert all(p.grad is not None for p in (*module.expert_parameters(), module.router.weight))


def test_parameter_counts():
    plain = make_ffn('ours')
    size = sum(p.numel() for p in plain.parameters())
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(MoEFFN.expand(plain, num_experts=3)) == 3 * size + 3 * 12
    assert count(ResidualMoEFFN.expand(plain, num_experts=3)) == 4 * size + 3 * 12


def test_groups_of_core_and_experts():
    model = nn.Sequential(nn.Linear(12, 12), ResidualMoEFFN.expand(Mlp(12, 20)))
    groups = {g['name']: g for g in param_groups(model, 1e-2, 0.05, expert_lr_mult=2., core_lr_mult=0.1)}
    assert list(groups) == ['decay', 'no_decay', 'experts.decay', 'experts.no_decay', 'core.decay', 'core.no_decay']
    assert [groups[k]['lr'] for k in ('decay', 'experts.decay', 'core.decay')] == pytest.approx([1e-2, 2e-2, 1e-3])
    held = {id(p) for p in groups['core.decay']['params']}
    assert held == {id(model[1].fc1.weight), id(model[1].fc2.weight)}
    assert any(p is model[1].router.weight for p in groups['decay']['params'])
    with pytest.raises(ValueError, match='core_lr_mult needs a learning rate'):
        param_groups(model, core_lr_mult=0.5)
    with pytest.raises(ValueError, match='core_lr_mult'):
        param_groups(model, 1e-2, core_lr_mult=0)


@pytest.mark.parametrize('kind', ['MoEFFN', 'ResidualMoEFFN'])
def test_stop_and_resume_is_one_run(kind):
    x = torch.randn(4, 9, 12)

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(0.1), Mlp(12, 20))
        expand(model, dict(type=kind, at='1', capacity_factor=1.))
        optimizer = torch.optim.AdamW(param_groups(model, 1e-2, 0.05))
        return model.train(), optimizer

    def steps(model, optimizer, first, last):
        with attach_ewa(optimizer, model, 0.3, 'linear', total_steps=4, start_step=first):
            for _ in range(first, last):
                optimizer.zero_grad()
                (model(x).square().mean() + sum(routing_losses(model).values())).backward()
                optimizer.step()

    model, optimizer = start()
    steps(model, optimizer, 0, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    steps(model, optimizer, 2, 4)
    twin, other = start()
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    torch.set_rng_state(saved[2])
    steps(twin, other, 2, 4)
    for (name, own), (_, resumed) in zip(model.named_parameters(), twin.named_parameters()):
        assert torch.equal(own, resumed), name


@pytest.mark.parametrize('cls', BOTH)
def test_copies_pickles_and_dtypes(cls):
    module, _ = build(cls)
    x = torch.randn(5, 12, dtype=torch.float64)
    module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert twin.routing is None
        assert torch.equal(twin.eval()(x), module.eval()(x))
        module.train()
    with torch.autocast('cpu', torch.bfloat16):
        y = module.float()(x.float())
        assert y.dtype == torch.bfloat16
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('cls', BOTH)
def test_compiles_without_graph_breaks(cls):
    for cfg in (dict(capacity_factor=1.), dict(capacity_factor=None)):
        module, _ = build(cls, **cfg)
        x = torch.randn(2, 5, 12, dtype=torch.float64)
        eager = module(x)
        losses = routing_stats(module)
        compiled = torch.compile(module, backend='eager', fullgraph=True)
        torch.testing.assert_close(compiled(x), eager)
        for name, value in routing_stats(module).items():
            torch.testing.assert_close(value, losses[name])


# ---- refusals -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('cls', BOTH)
@pytest.mark.parametrize('cfg, error, message', [
    (dict(top_k=5), ValueError, 'top_k=5 is more than num_experts=4'),
    (dict(top_k=0), ValueError, 'top_k must be at least 1'),
    (dict(top_k=1.5), TypeError, 'top_k must be an integer'),
    (dict(num_experts=1), ValueError, 'num_experts must be at least 2'),
    (dict(capacity_factor=0), ValueError, 'capacity_factor must lie in'),
    (dict(eval_capacity_factor=-1), ValueError, 'eval_capacity_factor'),
    (dict(capacity_factor='a'), TypeError, 'capacity_factor must be a number'),
    (dict(gate_mode='renom'), ValueError, "did you mean 'renorm'"),
    (dict(balance_weight=-1), ValueError, 'balance_weight'),
    (dict(z_weight=float('nan')), ValueError, 'z_weight'),
    (dict(init_noise_std=-1), ValueError, 'init_noise_std'),
    (dict(in_features=0), ValueError, 'in_features'),
])
def test_bad_values(cls, cfg, error, message):
    with pytest.raises(error, match=message):
        cls.expand(Mlp(12, 20), **cfg)


@pytest.mark.parametrize('cfg, error, message', [
    (dict(rank=13), ValueError, r'rank=13 is larger than that of fc1.weight, which is 20 × 12'),
    (dict(rank=0), ValueError, 'rank must be at least 1'),
    (dict(rank=2.), TypeError, 'rank must be an integer'),
    (dict(freeze_core=1), TypeError, 'freeze_core must be True or False'),
])
def test_bad_values_of_residuals(cfg, error, message):
    with pytest.raises(error, match=message):
        ResidualMoEFFN.expand(Mlp(12, 20), **cfg)


class NoWidth(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = nn.Parameter(torch.ones(12))

    def forward(self, x):
        return x * self.router


class MixesTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x):
        return self.linear(x - x.mean(-2, keepdim=True))


def test_ffns_that_cannot_be():
    plain = NoWidth()
    with pytest.raises(ValueError, match='give in_features'):
        MoEFFN.expand(plain)
    with pytest.raises(ValueError, match="'router' of its own"):
        MoEFFN.expand(plain, in_features=12)
    with pytest.raises(ValueError, match='already has experts'):
        ResidualMoEFFN.expand(nn.Sequential(MoEFFN.expand(Mlp(12, 20))))
    module = MoEFFN.expand(Mlp(12, 20))
    with pytest.raises(ValueError, match='router takes tokens of width 12'):
        module(torch.randn(3, 11))
    mixing = MoEFFN.expand(MixesTokens())
    with pytest.raises(TypeError, match='does not treat every token'):
        mixing.train()(torch.randn(2, 5, 12))
