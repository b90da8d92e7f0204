"""What looking at the loss and the gradients of every step costs, on a small model, in one run with and without."""
import statistics
import time
from pathlib import Path

import pytest
from engine_toys import on_cpu, toy_config  # noqa: F401
from mmengine.config import Config

from ewa3d.engine.finite import FiniteHook
from ewa3d.engine.runner import Runner

ROOT = Path(__file__).parents[2]
PAIRS, WARM_UP = 40, 6


@pytest.mark.reliability
@pytest.mark.parametrize('action', ['raise', 'skip'])
def test_the_check_costs_little(tmp_path, action):
    """Steps with and without it alternate; processor time, which other programs do not add to."""
    model = Config.fromfile(ROOT / 'configs' / '_base_' / 'models' / 'point-mae_xs_cls.py').model.to_dict()
    cfg = toy_config(tmp_path, ewa=True, epochs=1, model=model)
    cfg['model']['expand'] = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=2, num_experts=4)]
    cfg['train_dataloader']['dataset'].update(num_samples=8 * (PAIRS + WARM_UP), num_points=1024)
    cfg['default_hooks']['finite'] = dict(type='FiniteHook', action=action)
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg', 'test_dataloader', 'test_evaluator', 'test_cfg'):
        cfg.pop(key)
    runner, call, times = Runner.from_cfg(cfg), Runner.call_hook, ([], [])

    def timing(stage: str, **kwargs) -> None:
        if stage == 'before_train_iter':
            guard = next(hook for hook in runner.hooks if isinstance(hook, FiniteHook))
            runner.optim_wrapper.guard = guard if runner.iter % 2 else None
            timing.started = time.thread_time()
        call(runner, stage, **kwargs)
        if stage == 'after_train_iter':
            times[runner.iter % 2].append(time.thread_time() - timing.started)

    runner.call_hook = timing
    runner.train()
    without, with_it = (statistics.median(found[WARM_UP:]) * 1000 for found in times)
    spread = statistics.quantiles([b - a for a, b in zip(*(found[WARM_UP:] for found in times))], n=4)
    size = sum(p.numel() for p in runner.model.parameters())
    print(f"\naction='{action}', {size / 1e6:.2f} million parameters, batch 4: {without:.1f} ms a step without, "
          f'{with_it:.1f} ms with: {with_it - without:+.2f} ms ({100 * (with_it / without - 1):+.1f} %); quartiles of '
          f'the differences of neighbours: {", ".join(f"{1000 * value:+.2f}" for value in spread)} ms')
    assert with_it < 1.5 * without
