"""The learning-rate schedule in closed form; autocast with accumulation and clipping."""
import math

import pytest
import torch
from torch import nn

from ewa3d.engine.optim import AutocastOptimWrapper, WarmupCosineLR
from ewa3d.registry import OPTIM_WRAPPERS


def run(total, lr=0.1, groups=1, **options):
    """The learning rates that an optimizer sees over a run, one list a group."""
    model = [nn.Parameter(torch.zeros(1)) for _ in range(groups)]
    optimizer = torch.optim.SGD([dict(params=[p], lr=lr * (i + 1)) for i, p in enumerate(model)], lr=lr)
    scheduler = WarmupCosineLR(optimizer, end=total, **options)
    rates = []
    for _ in range(total):
        rates.append([group['lr'] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def test_against_the_formula():
    rates = [r[0] for r in run(100, warmup=0.1, warmup_factor=0.01, eta_min=0.001)]
    for t, rate in enumerate(rates):
        if t < 10:
            expected = 0.1 * (0.01 + 0.99 * t / 10)
        else:
            expected = 0.001 + (0.1 - 0.001) * (1 + math.cos(math.pi * (t - 10) / 90)) / 2
        assert rate == pytest.approx(expected, rel=1e-12), t


@pytest.mark.parametrize('total', [1, 2, 3, 7])
def test_tiny_runs(total):
    rates = [r[0] for r in run(total, warmup=1 / 30)]
    assert rates[0] == pytest.approx(0.1) and all(0 < r <= 0.1 for r in rates)


def test_groups_keep_their_ratio():
    for one, two in run(50, groups=2, warmup=0.2, eta_min=1e-3):
        assert two == pytest.approx(2 * one, rel=1e-12)


def test_it_rescales_with_the_run():
    short, long = run(100, warmup=0.1), run(1000, warmup=0.1)
    assert [r[0] for r in short] == pytest.approx([r[0] for r in long[::10]], rel=1e-12)


def test_state():
    parameter = nn.Parameter(torch.zeros(1))

    def fresh(end):
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        return optimizer, WarmupCosineLR(optimizer, warmup=0.1, end=end)

    optimizer, scheduler = fresh(40)
    for _ in range(13):
        optimizer.step()
        scheduler.step()
    other, resumed = fresh(40)
    resumed.load_state_dict(scheduler.state_dict())
    assert other.param_groups[0]['lr'] == optimizer.param_groups[0]['lr']
    scheduler.step(), resumed.step()
    assert other.param_groups[0]['lr'] == optimizer.param_groups[0]['lr']


@pytest.mark.parametrize(('options', 'text'), [
    (dict(warmup=10), '1/30'), (dict(warmup=-0.1), 'warmup'), (dict(warmup_factor=2), 'warmup_factor'),
    (dict(eta_min=0.1, eta_min_ratio=0.1), 'not both'), (dict(eta_min=1.0), 'base rate'),
    (dict(by_epoch=True), 'by_epoch')])
def test_bad_schedules(options, text):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=text):
        WarmupCosineLR(optimizer, end=10, **options)


def linear_problem(**options):
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapper = OPTIM_WRAPPERS.build(dict(type='AutocastOptimWrapper', optimizer=optimizer, **options))
    return model, wrapper


def test_autocast_is_on_in_training_only():
    model, wrapper = linear_problem()
    with wrapper.optim_context(model):
        assert model(torch.zeros(2, 8)).dtype == torch.bfloat16
    assert model(torch.zeros(2, 8)).dtype == torch.float32
    assert model.weight.dtype == torch.float32


def test_accumulation_and_clipping_as_in_plain_torch():
    x, y = torch.randn(6, 4, 8), torch.randn(6, 4, 1)
    model, wrapper = linear_problem(accumulative_counts=2, clip_grad=dict(max_norm=0.5))
    wrapper.initialize_count_status(model, 0, 6)
    twin, _ = linear_problem()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for i in range(6):
        with wrapper.optim_context(model):
            loss = (model(x[i]).float() - y[i]).square().mean()
        wrapper.update_params(loss)
        with torch.autocast('cpu', torch.bfloat16):
            loss = (twin(x[i]).float() - y[i]).square().mean()
        (loss / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        assert torch.equal(model.weight, twin.weight), i


def test_bad_autocast():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match='bfloat16'):
        AutocastOptimWrapper(optimizer, dtype='int8')
    with pytest.raises(ValueError, match='CUDA device'):
        AutocastOptimWrapper(optimizer, dtype='float16')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='float16 needs a CUDA device')
def test_float16_skips_an_overflow():
    parameter = nn.Parameter(torch.ones(2, device='cuda'))
    wrapper = AutocastOptimWrapper(torch.optim.SGD([parameter], lr=0.1), dtype='float16')
    scale = wrapper.scaler.get_scale()
    wrapper.update_params((parameter * float('inf')).sum())
    assert torch.equal(parameter, torch.ones_like(parameter)) and wrapper.scaler.get_scale() < scale
    state = wrapper.state_dict()
    assert 'loss_scaler' in state
    wrapper.load_state_dict(state)
