"""NaN and infinite losses and gradients: named, or left out without a trace."""
import json
import math

import pytest
import torch
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from torch import nn

from ewa3d.engine.averaging import attach_ewa
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.finite import FiniteHook, is_finite
from ewa3d.engine.runner import Runner
from ewa3d.layers.block import Mlp
from ewa3d.layers.experts import iter_experts
from ewa3d.reparam import expand


def build(tmp_path, iterations=(), where='output', value=math.nan, **options) -> Runner:
    """A run that meets ``value`` in these iterations (counted from 0): in a module's output, or in a gradient."""
    finite = {k: options.pop(k) for k in ('action', 'limit') if k in options}
    cfg = toy_config(tmp_path, ewa=True, **{'epochs': 1, **options})
    cfg['default_hooks']['finite'] = dict(type='FiniteHook', **finite)
    runner = Runner.from_cfg(cfg)
    module = runner.model.backbone.blocks[1].mlp
    if where == 'output':
        module.register_forward_hook(lambda m, args, out: out * value if m.training and runner.iter in iterations
                                     else None)
    else:
        module.fc1.weight.register_hook(lambda g: g * value if runner.iter in iterations else None)
    return runner


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_bad_loss_is_an_error_that_names_step_samples_and_module(tmp_path, value):
    with pytest.raises(FloatingPointError) as caught:
        build(tmp_path, [3], value=value).train()
    text = str(caught.value)
    assert 'iteration 4, epoch 1: the loss is nan' in text and "the first module with such an output is " in text
    assert "'backbone.blocks.1.mlp' (EWAFFN)" in text and text.count('index') == 4 and 'toy' in text
    assert "default_hooks.finite.action='skip'" in text


def test_bad_gradients_name_the_module_that_the_backward_meets_first(tmp_path):
    with pytest.raises(FloatingPointError, match=r"iteration 3, .*gradients are not finite; .* 'backbone.blocks.1.mlp"):
        build(tmp_path, [2], 'gradient', epochs=1).train()


def test_parameters_that_are_bad_already_are_named(tmp_path):
    runner = build(tmp_path)
    with torch.no_grad():
        list(runner.model.head.parameters())[-1][0] = math.nan
    with pytest.raises(FloatingPointError, match=r'iteration 1, .*parameters that are not finite before .*: head'):
        runner.train()


@pytest.mark.parametrize('where', ['output', 'gradient'])
@pytest.mark.parametrize('wrapper', ['OptimWrapper', 'AutocastOptimWrapper'])
def test_a_skipped_step_leaves_no_trace(tmp_path, where, wrapper):
    """Parameters, moments, buffers and experts are what they were; counted in the log; no NaN in metrics.jsonl."""
    runner = build(tmp_path, [2, 3], where, action='skip',
                   optim_wrapper=dict(type=wrapper, optimizer=dict(type='AdamW', lr=2e-3), clip_grad=dict(max_norm=1)))
    states = []
    call = runner.call_hook

    def watching(stage, **kwargs):
        if stage == 'before_train_iter':
            states.append(({k: v.clone() for k, v in runner.model.state_dict().items()},
                           [v.clone() for s in runner.optim_wrapper.optimizer.state.values() for v in s.values()]))
        call(stage, **kwargs)

    runner.call_hook = watching
    runner.train()
    assert same(states[2], states[3]) and same(states[3], states[4])  # as before iterations 2, 3 and 4
    assert not same(states[1], states[2]) and not same(states[4], states[5])
    assert is_finite(runner.model.state_dict())
    text = (tmp_path / 'metrics.jsonl').read_text()
    assert 'NaN' not in text and json.loads(text.splitlines()[0])['skipped_steps'] == 2
    log = (tmp_path / 'train.log').read_text()
    assert log.count('the step is left out') == 2 and 'skipped_steps: 2' in log
    hub = read_checkpoint(tmp_path / 'epoch_1.pth')['message_hub']
    assert hub['skipped_steps'] == 2 and hub['skipped_in_row'] == 0


@pytest.mark.parametrize(('value', 'fine'), [(1., True), (1e30, True), (3e38, True), (math.inf, False),
                                             (-math.inf, False), (math.nan, False)])
def test_large_gradients_are_finite(value, fine):
    hook = FiniteHook()
    hook.see(torch.zeros(()))
    assert hook._are_finite([torch.ones(3), torch.tensor([[value, 0.]]), torch.zeros(())]) is fine


def test_skipping_does_not_disturb_what_follows(tmp_path):
    """Naming the module costs a second forward; the random generators do not notice."""
    states = []
    for name in 'ab':
        runner = build(tmp_path / name, [1], action='skip')
        hook = next(h for h in runner.hooks if isinstance(h, FiniteHook))
        if name == 'b':
            hook._describe = lambda: 'unknown'
        runner.train()
        states.append(runner.model.state_dict())
    assert same(dict(states[0]), dict(states[1]))


def test_more_than_the_limit_in_a_row_is_an_error(tmp_path):
    build(tmp_path / 'a', [0, 1, 3, 4], action='skip', limit=2).train()
    with pytest.raises(FloatingPointError, match='2 steps in a row were left out'):
        build(tmp_path / 'b', [1, 2, 3], action='skip', limit=2).train()


def test_a_group_of_an_accumulation_is_one_step(tmp_path):
    runner = build(tmp_path, [1], action='skip', optim_wrapper=dict(
        type='OptimWrapper', accumulative_counts=3, optimizer=dict(type='AdamW', lr=2e-3)))
    runner.train()
    steps = {int(s['step']) for s in runner.optim_wrapper.optimizer.state.values()}
    assert steps == {1} and is_finite(runner.model.state_dict())  # six iterations, two groups, one of them left out
    assert 'iteration 3' in (tmp_path / 'train.log').read_text()


def test_the_hook_takes_nothing_else():
    with pytest.raises(ValueError, match="no action 'ignore'"):
        FiniteHook('ignore')
    with pytest.raises(ValueError, match='limit must be at least 1'):
        FiniteHook('skip', 0)


def test_a_loop_of_ones_own_that_skips_spreads_nothing():
    """``attach_ewa`` averages after steps; a loop that leaves one out, or a scaler that does, averages nothing."""
    model = nn.ModuleDict(dict(mlp=Mlp(3, 5)))
    expand(model, dict(type='EWAFFN', at='mlp', num_experts=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attach_ewa(optimizer, model, share_rate=0.5, schedule='constant')
    for step in range(4):
        optimizer.zero_grad()
        loss = model['mlp'](torch.randn(8, 3)).square().mean() * (math.nan if step == 2 else 1)
        loss.backward()
        if loss.isfinite():
            optimizer.step()
    experts = [p for _, m in iter_experts(model) for p in m.expert_parameters()]
    assert is_finite([p.detach() for p in experts])


def test_experts_that_diverge_are_in_the_log(tmp_path):
    """Once for each doubling of the spread of a layer, and the layer is named."""
    cfg = toy_config(tmp_path, ewa=True, epochs=4)
    cfg['default_hooks']['ewa']['share_rate'] = 0.01
    runner = Runner.from_cfg(cfg)
    call, layer = runner.call_hook, runner.model.backbone.blocks[1].mlp

    def pulling(stage, **kwargs):
        if stage == 'before_train_epoch' and runner.epoch in (1, 3):
            with torch.no_grad():
                for expert, way in enumerate((1, -1)):
                    layer.fc1.weight[expert] += 0.3 * way * runner.epoch
        call(stage, **kwargs)

    runner.call_hook = pulling
    runner.train()
    log = (tmp_path / 'train.log').read_text()
    assert log.count('the experts of backbone.blocks.1.mlp diverge') == 2 and 'blocks.0.mlp diverge' not in log
    assert 'iteration 12: the experts' in log and 'iteration 24: the experts' in log
