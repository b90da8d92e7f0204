"""The EWA update and when it happens: closed form, dense equivalence, schedules, skipped steps, ranks, resume."""
import copy
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

import ewa3d
from ewa3d.engine import averaging
from ewa3d.engine.averaging import attach_ewa, average_, largest_share_rate
from ewa3d.engine.schedules import SCHEDULES, ShareRate
from ewa3d.layers.block import Mlp
from ewa3d.layers.experts import iter_experts


class Net(nn.Module):
    def __init__(self, depth: int = 2, dim: int = 6):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(mlp=Mlp(dim, 10))) for _ in range(depth))
        self.head = nn.Linear(dim, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block['mlp'](x)
        return self.head(x)


def _net(experts: int = 4, dtype=torch.float64, **cfg) -> Net:
    model = Net().to(dtype)
    ewa3d.expand(model, dict(type='EWAFFN', at='blocks.*.mlp', num_experts=experts, **cfg))
    return model


def _stack(model) -> list[torch.Tensor]:
    return [p.detach().clone() for _, m in iter_experts(model) for p in m.expert_parameters()]


def _literal(stacked: torch.Tensor, rate: float) -> torch.Tensor:
    """The sum over the other experts, as written in the paper's relatives."""
    count = len(stacked)
    return torch.stack([(1 - rate) * stacked[i] + rate / (count - 1) * sum(stacked[j] for j in range(count) if j != i)
                        for i in range(count)])


def _step(model, optimizer, x=None) -> None:
    x = torch.randn(8, 6, dtype=next(model.parameters()).dtype) if x is None else x
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


# ---------------------------------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('count', [2, 3, 4, 7])
@pytest.mark.parametrize('share', [0., 0.1, 0.5, 1.])
def test_closed_form_is_the_literal_formula(count, share):
    rate = share * largest_share_rate(count)
    w = torch.randn(count, 5, 3, dtype=torch.float64)
    expected, mean, deviation = _literal(w, rate), w.mean(0), w - w.mean(0)
    average_(w, rate)
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(w.mean(0), mean, rtol=0, atol=1e-14)
    torch.testing.assert_close(w - w.mean(0), (1 - share) * deviation, rtol=0, atol=1e-14)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_few_calls_of_a_gpu_do_the_same(monkeypatch, dtype):
    w = torch.randn(4, 5, 3).to(dtype)
    others = [w.clone(), w.clone().mT]  # not contiguous
    average_(w, 0.3)
    monkeypatch.setattr(averaging, '_one_by_one', lambda experts: False)
    average_(others, 0.3)
    for other in (others[0], others[1].mT):
        torch.testing.assert_close(other, w)
    average_(others[0][:2], 0.5)
    assert torch.equal(others[0][0], others[0][1])


def test_deviation_decays_geometrically():
    w = torch.randn(4, 9, dtype=torch.float64)
    start = w - w.mean(0)
    for _ in range(10):
        average_(w, 0.3)
    torch.testing.assert_close(w - w.mean(0), (1 - 0.3 * 4 / 3) ** 10 * start, rtol=0, atol=1e-14)


def test_full_averaging_makes_experts_bit_equal():
    w = torch.randn(3, 50)
    average_(w, 2 / 3)
    assert torch.equal(w[0], w[1])
    assert torch.equal(w[0], w[2])


def test_low_precision_is_averaged_in_float32():
    w = torch.randn(4, 1000).to(torch.bfloat16)
    expected = _literal(w.double(), 0.3)
    average_(w, 0.3)
    torch.testing.assert_close(w.double(), expected, rtol=2 ** -8, atol=1e-6)  # half a unit in the last place


@pytest.mark.parametrize('rate', [-0.1, 0.76, 1., math.nan, math.inf])
def test_share_rate_outside_is_refused(rate):
    w, v = torch.randn(8, 3), torch.randn(4, 3)
    before = w.clone()
    with pytest.raises(ValueError, match=r'share rate .* is outside \[0, \(E - 1\) / E\]'):
        average_([w, v], rate)
    assert torch.equal(w, before)


def test_the_error_names_the_limit():
    with pytest.raises(ValueError, match=r'0\.75\] for 4 experts'):
        average_(torch.randn(4, 3), 0.76)


@pytest.mark.parametrize('rate', ['0.3', None, True])
def test_share_rate_is_a_number(rate):
    with pytest.raises(TypeError, match='share_rate must be a number'):
        average_(torch.randn(4, 3), rate)


def test_average_takes_modules():
    model = _net()
    for _, m in iter_experts(model):
        nn.init.normal_(m.fc1.weight)
    head = model.head.weight.clone()
    average_(model, 0.75)
    for _, m in iter_experts(model):
        torch.testing.assert_close(m.fc1.weight, m.fc1.weight[:1].expand_as(m.fc1.weight))
    assert torch.equal(model.head.weight, head)


def test_one_expert_is_refused():
    with pytest.raises(ValueError, match='at least 2 experts'):
        average_(torch.randn(1, 3), 0.)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------
def test_schedules():
    assert [SCHEDULES['linear'](p) for p in (0., 0.5, 1.)] == [0., 0.5, 1.]
    assert [SCHEDULES['constant'](p) for p in (0., 1.)] == [1., 1.]
    assert [round(SCHEDULES['cosine'](p), 12) for p in (0., 0.5, 1.)] == [0., 0.5, 1.]


def test_share_rate_is_a_function_of_the_step():
    rate = ShareRate(0.3, 'linear', 10)
    assert [round(rate(step), 12) for step in (0, 5, 10, 99)] == [0., 0.15, 0.3, 0.3]
    early = ShareRate(0.4, 'constant', 10, end=0.5)
    assert [early(step) for step in range(10)] == [0.4] * 5 + [0.] * 5
    late = ShareRate(0.4, lambda p: p ** 2, 10, begin=0.5)
    assert [round(late(step), 12) for step in (0, 4, 5, 7, 10)] == [0., 0., 0., round(0.4 * 0.16, 12), 0.4]


# ---------------------------------------------------------------------------------------------------------------------
# attach_ewa
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('optimizer_type', [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_it_averages_after_each_step(optimizer_type):
    model = _net(init_noise_std=0.1)
    twin = copy.deepcopy(model)
    optimizer, twin_optimizer = (optimizer_type(m.parameters(), lr=0.05) for m in (model, twin))
    handle = attach_ewa(optimizer, model, share_rate=0.3, schedule='linear', total_steps=8)
    for step in range(4):
        assert handle.step == step
        assert handle.rate == pytest.approx(0.3 * step / 8)
        rate, x = handle.rate, torch.randn(8, 6, dtype=torch.float64)
        torch.manual_seed(step)
        _step(model, optimizer, x)
        torch.manual_seed(step)
        _step(twin, twin_optimizer, x)
        with torch.no_grad():
            for _, m in iter_experts(twin):
                for p in m.expert_parameters():
                    p.copy_(_literal(p, rate))
        for own, other in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-13)


def test_dense_equivalence():
    """Copies, SGD, full sharing, gradient scale E: the weights of training the plain network, to machine precision."""
    model, dense = _net(expert_grad_scale='E'), Net().double()
    dense.load_state_dict({k: v[0] if v.ndim and 'mlp' in k else v for k, v in model.state_dict().items()})
    optimizer, dense_optimizer = (torch.optim.SGD(m.parameters(), lr=0.2) for m in (model, dense))
    attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=20)
    for _ in range(20):
        x = torch.randn(3, 7, 6, dtype=torch.float64)  # 21 tokens, 4 experts
        _step(model, optimizer, x)
        _step(dense, dense_optimizer, x)
    ewa3d.fuse(model)
    for own, other in zip(model.parameters(), dense.parameters()):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-14)


def test_every_and_window():
    model = _net(init_noise_std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=10, every=3, begin=0.3)
    changed = []
    for _ in range(6):
        before = _stack(model)
        _step(model, optimizer)
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, _stack(model))))
    assert changed == [False, False, False, False, False, True]  # step 3 lies before `begin`, step 6 averages


def test_gradient_accumulation_averages_once():
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=10)
    for _ in range(3):
        model(torch.randn(8, 6, dtype=torch.float64)).sum().backward()
        assert handle.step == 0
    optimizer.step()
    assert handle.step == 1


@pytest.mark.parametrize('fused', [False, True])
def test_skipped_steps_do_not_average(fused):
    model = _net(dtype=torch.float32, init_noise_std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    handle = attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=10)
    scaler = torch.amp.GradScaler('cpu', init_scale=4.)
    for overflow in (True, False, True):
        before, step = _stack(model), handle.step
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(8, 6)).sum()).backward()
        if overflow:
            model.head.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert handle.step == step + (not overflow)
        assert all(torch.equal(a, b) for a, b in zip(before, _stack(model))) is overflow


def test_closures():
    model = _net()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    handle = attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=10)
    x = torch.randn(8, 6, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        loss = model.eval()(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert handle.step == 1


def test_lr_scheduler_and_step_post_hooks_of_others_keep_working():
    model, calls = _net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    handle = attach_ewa(optimizer, model, total_steps=10)
    _step(model, optimizer)
    scheduler.step()
    assert (handle.step, calls) == (1, [1])


def test_remove_and_context_manager():
    model = _net(init_noise_std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    with attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=10) as handle:
        with pytest.raises(ValueError, match='already averaged'):
            attach_ewa(optimizer, model, total_steps=10)
        _step(model, optimizer)
    assert handle.step == 1
    handle.remove()
    before = _stack(model)
    _step(model, optimizer)
    assert handle.step == 1
    assert all(torch.equal(a, b) for a, b in zip(before, _stack(model)))
    attach_ewa(optimizer, model, total_steps=10).remove()


def test_step_is_settable():
    model = _net()
    handle = attach_ewa(torch.optim.SGD(model.parameters(), lr=0.1), model, total_steps=10, start_step=3)
    assert handle.rate == pytest.approx(0.09)
    handle.step = 7
    assert handle.rate == pytest.approx(0.21)
    for wrong, error in ((-1, ValueError), (1.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match='step'):
            handle.step = wrong


def test_moments():
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=10, average_moments=True)
    for _ in range(3):
        _step(model, optimizer)
    for _, m in iter_experts(model):
        for p in m.expert_parameters():
            for key in ('exp_avg', 'exp_avg_sq'):
                value = optimizer.state[p][key]
                torch.testing.assert_close(value, value[:1].expand_as(value))
            assert optimizer.state[p]['step'] == 3


def test_frozen_experts_may_be_missing_and_join_when_thawed():
    model = _net(init_noise_std=0.1)
    frozen = model.blocks[0]['mlp'].fc1.weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=10)
    before = frozen.clone()
    _step(model, optimizer)
    assert torch.equal(frozen, before)
    optimizer.add_param_group(dict(params=[frozen.requires_grad_(True)]))
    _step(model, optimizer)
    torch.testing.assert_close(frozen, frozen[:1].expand_as(frozen))


def test_bf16_parameters():
    model = _net(dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    attach_ewa(optimizer, model, share_rate=0.75, schedule='constant', total_steps=10)
    _step(model, optimizer)
    assert all(torch.equal(p, p[:1].expand_as(p)) for p in _stack(model))


@pytest.mark.parametrize('kwargs, error, message', [
    ({}, ValueError, 'total_steps is missing'),
    (dict(total_steps=0), ValueError, 'total_steps must be at least 1'),
    (dict(total_steps=10.), TypeError, 'total_steps must be an integer'),
    (dict(schedule='constant', end=0.5), ValueError, 'total_steps is missing'),
    (dict(schedule=lambda p: p), ValueError, 'total_steps is missing'),
    (dict(total_steps=10, begin='a'), TypeError, 'begin'),
    (dict(total_steps=10, schedule=lambda p: None), TypeError, 'gives None at progress 0'),
    (dict(total_steps=10, schedule=lambda p: -p), ValueError, r'progress 0\.5: share rate -0\.15'),
    (dict(total_steps=10, schedule=lambda p: 3 * p), ValueError, r'progress 1: share rate 0\.\d+ is outside'),
    (dict(total_steps=10, start_step=-1), ValueError, 'step must be at least 0'),
    (dict(total_steps=10, share_rate=0.8), ValueError, r'0\.75'),
    (dict(total_steps=10, share_rate=-0.1), ValueError, 'share rate'),
    (dict(total_steps=10, share_rate='a'), TypeError, 'share_rate'),
    (dict(total_steps=10, schedule='linaer'), KeyError, "did you mean 'linear'"),
    (dict(total_steps=10, schedule=3), TypeError, 'schedule'),
    (dict(total_steps=10, begin=0.5, end=0.5), ValueError, 'begin'),
    (dict(total_steps=10, end=1.1), ValueError, 'end'),
    (dict(total_steps=10, every=0), ValueError, 'every'),
])
def test_wrong_arguments(kwargs, error, message):
    model = _net()
    with pytest.raises(error, match=message):
        attach_ewa(torch.optim.SGD(model.parameters(), lr=0.1), model, **kwargs)


def test_a_schedule_that_leaves_the_range_between_the_tried_points_is_refused():
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_ewa(optimizer, model, share_rate=0.5, schedule=lambda p: 2. if 0.1 < p < 0.4 else 0., total_steps=4)
    _step(model, optimizer)
    with pytest.raises(ValueError, match='share rate 1'):
        _step(model, optimizer)


def test_a_constant_rate_needs_no_length():
    model = _net(init_noise_std=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    handle = attach_ewa(optimizer, model, share_rate=0.5, schedule='constant')
    before = _stack(model)
    for step in range(3):
        assert (handle.step, handle.rate) == (step, 0.5)
        _step(model, optimizer)
    handle.step = 10 ** 9
    assert handle.rate == 0.5
    for own, first in zip(_stack(model), before):
        torch.testing.assert_close(own - own.mean(0), (1 / 3) ** 3 * (first - first.mean(0)), rtol=0, atol=1e-14)


def test_numbers_of_numpy():
    model = _net()
    handle = attach_ewa(torch.optim.SGD(model.parameters(), lr=0.1), model, share_rate=np.float32(0.5),
                        total_steps=np.int64(10), start_step=np.int32(2), begin=np.float64(0), every=np.uint8(1))
    assert handle.rate == pytest.approx(0.1)
    assert type(handle.rate) is float and type(handle.step) is int
    average_(model, np.float64(0.5))


def test_a_warning_when_all_experts_are_frozen(caplog):
    model = _net()
    for _, m in iter_experts(model):
        m.requires_grad_(False)
    attach_ewa(torch.optim.SGD(model.head.parameters(), lr=0.1), model, total_steps=10)
    assert 'all experts are frozen' in caplog.text


def test_a_warning_once_when_the_experts_were_fused(caplog):
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_ewa(optimizer, model, total_steps=10)
    _step(model, optimizer)
    assert not caplog.text
    ewa3d.fuse(model)
    caplog.clear()
    for _ in range(3):
        _step(model, optimizer)
    assert caplog.text.count('2 modules with experts are gone') == 1


def test_wrong_optimizers():
    model = Net()
    stale = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match='Net has no experts'):
        attach_ewa(stale, model, total_steps=10)
    ewa3d.expand(model, dict(type='EWAFFN', at='blocks.*.mlp'))
    with pytest.raises(ValueError, match=r'blocks\.0\.mlp\.fc1\.weight.*and 2 more; create it after'):
        attach_ewa(stale, model, total_steps=10)
    partial = torch.optim.SGD([p for n, p in model.named_parameters() if n != 'blocks.1.mlp.fc2.bias'], lr=0.1)
    with pytest.raises(ValueError, match=r'experts blocks\.1\.mlp\.fc2\.bias;'):
        attach_ewa(partial, model, total_steps=10)
    with pytest.raises(TypeError, match=r'torch\.optim\.Optimizer, got Net'):
        attach_ewa(model, model, total_steps=10)


def test_flattened_parameters_are_refused():
    class FullyShardedDataParallel(nn.Sequential):
        """Only the name of torch's: the real one needs a process group."""

    model = FullyShardedDataParallel(_net())
    with pytest.raises(ValueError, match='FullyShardedDataParallel, which flattens'):
        attach_ewa(torch.optim.SGD(model.parameters(), lr=0.1), model, total_steps=10)


def test_optim_wrapper_hint():
    from mmengine.optim import OptimWrapper
    model = _net()
    with pytest.raises(TypeError, match=r'pass its \.optimizer'):
        attach_ewa(OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1)), model, total_steps=10)


def test_compiled_model():
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_ewa(optimizer, torch.compile(model, backend='eager'), total_steps=10)
    _step(model, optimizer)
    assert handle.step == 1


# ---------------------------------------------------------------------------------------------------------------------
# Resume and ranks
# ---------------------------------------------------------------------------------------------------------------------
def _train(model, optimizer, handle, steps):
    for _ in range(steps):
        assert handle.step < 8
        _step(model, optimizer, torch.randn(3, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize('ffn', ['batch', 'sample'])
def test_stop_and_resume_is_one_run(ffn):
    def fresh(start):
        model = _net(partition=ffn, init_noise_std=0.01)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, attach_ewa(optimizer, model, share_rate=0.5, total_steps=8, start_step=start)

    torch.manual_seed(0)
    whole = fresh(0)
    _train(*whole, 8)
    torch.manual_seed(0)
    first = fresh(0)
    _train(*first, 5)
    saved = copy.deepcopy(dict(model=first[0].state_dict(), optimizer=first[1].state_dict(), rng=torch.get_rng_state()))
    torch.manual_seed(99)
    second = fresh(5)
    second[0].load_state_dict(saved['model'])
    second[1].load_state_dict(saved['optimizer'])
    torch.set_rng_state(saved['rng'])
    _train(*second, 3)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[key]), key


def test_model_ema_follows():
    model = _net()
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_ewa(optimizer, model, share_rate=0.5, schedule='constant', total_steps=10)
    for _ in range(3):
        _step(model, optimizer)
        ema.update_parameters(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    before = ema.module.eval()(x)
    ewa3d.fuse(ema.module)
    torch.testing.assert_close(ema.module(x), before, rtol=0, atol=1e-13)
    assert [m for _, m in iter_experts(model)]


def _two_ranks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    try:
        torch.manual_seed(7)
        model = _net(dtype=torch.float32)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
        handle = attach_ewa(optimizer, wrapped, share_rate=0.5, schedule='constant', total_steps=6)
        torch.manual_seed(100 + rank)  # other data and other partitions on each rank; 1 token: experts without any
        for tokens in (8, 3, 1, 5):
            _step(wrapped, optimizer, torch.randn(tokens, 6))
        for action in (ewa3d.fuse, lambda m: ewa3d.expand(m, dict(type='EWAFFN', at='module.head'))):
            with pytest.raises(ValueError, match=r'DistributedDataParallel.*model\.module'):
                action(wrapped)
        with pytest.raises(ValueError, match='ZeroRedundancyOptimizer'):
            attach_ewa(ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1), model, total_steps=6)
        _sharded_experts(model)
        torch.save((handle.step, model.state_dict()), f'{folder}/{rank}.pt')
    finally:
        dist.destroy_process_group()


def _sharded_experts(model) -> None:
    """The mean is right whichever dimension is sharded: the experts' (what FSDP2 does unless told otherwise) or one of
    theirs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    mesh = init_device_mesh('cpu', (2,))
    for dim in (0, 1):
        sharded = copy.deepcopy(model)
        for _, experts in iter_experts(sharded):
            layer = experts.fc1
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(dim)]))
        optimizer = torch.optim.SGD(sharded.parameters(), lr=0.)
        attach_ewa(optimizer, sharded, share_rate=0.5, schedule='constant', total_steps=6)
        optimizer.step()
        expected = copy.deepcopy(model)
        average_(expected, 0.5)
        for (_, a), (_, b) in zip(iter_experts(sharded), iter_experts(expected)):
            torch.testing.assert_close(a.fc1.weight.full_tensor(), b.fc1.weight)


def test_two_ranks_keep_experts_bit_equal(tmp_path):
    mp.spawn(_two_ranks, args=(str(tmp_path),), nprocs=2)
    (step_a, a), (step_b, b) = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert step_a == step_b == 4
    assert all(torch.equal(value, b[key]) for key, value in a.items())
    first = a['blocks.0.mlp.fc1.weight']
    assert not torch.equal(first[0], first[1])
