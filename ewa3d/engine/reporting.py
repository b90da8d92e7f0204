"""What the log says about a whole run: what is trained, how its result is chosen, the result, and where its files are.
"""
from datetime import timedelta
from pathlib import Path

from mmengine.runner import EpochBasedTrainLoop

from ewa3d.engine.display_hooks import ProgressHook
from ewa3d.engine.hooks import EWAHook, unwrapped
from ewa3d.evaluation import is_of_one_class
from ewa3d.layers.experts import iter_experts

__all__ = ['close_displays', 'log_end', 'log_result', 'log_start']

FILES = ('report.html', 'metrics.jsonl', 'pictures')


def log_start(runner) -> None:
    """The selection rule and what ``model.expand`` did; a warning about experts that nothing averages."""
    runner.logger.info(f'selection: {runner.selection[1]}')
    model = unwrapped(runner.model)
    if hasattr(model, 'expand_report'):
        runner.logger.info(f'model.expand:\n{model.expand_report}')
    experts = next(((name, module) for name, module in iter_experts(model) if module.averaged), None)
    if experts is not None and not any(isinstance(hook, EWAHook) for hook in runner.hooks):
        runner.logger.warning(f'the model has experts ({experts[0]}, …) and the run no EWAHook: they are trained, but '
                              "not averaged; default_hooks=dict(ewa=dict(type='EWAHook')) averages them")


def log_result(runner) -> None:
    """The numbers that count, by the rule in ``runner.selection``."""
    if runner.selection[0] == 'best':
        hub = runner.message_hub.runtime_info
        found = [key for key in hub if key.startswith('best_score') and hub[key] is not None]
        for key in found:
            metric = key.removeprefix('best_score').removeprefix('_')
            score = f'{metric} {hub[key]:.2f}' if metric else f'score {hub[key]:.2f}'
            runner.logger.info(f'reported: {hub.get(key.replace("score", "ckpt", 1))}, {score}')
        if not found:
            runner.logger.warning('reported: no best epoch, because none was validated (train_cfg.val_begin and '
                                  'val_interval say when); the last checkpoint is what this run leaves')
    elif runner.last_metrics:
        result = '  '.join(f'{k} {v:.2f}' for k, v in runner.last_metrics.items() if not is_of_one_class(k))
        epochs = isinstance(runner.train_loop, EpochBasedTrainLoop)
        where = f'epoch ({runner.epoch})' if epochs else f'iteration ({runner.iter})'
        runner.logger.info(f'reported: last {where}: {result}')


def log_end(runner, what: str, seconds: float) -> None:
    """How long it took and where the files are."""
    folder = Path(runner.work_dir)
    last = runner.message_hub.runtime_info.get('last_ckpt') if runner._train_loop is not None else None
    files = [name for name in FILES if (folder / name).exists()] + ([Path(last).name] if last else [])
    runner.logger.info(f'{what} took {timedelta(seconds=round(seconds))}; in {folder}: {", ".join(files)}')


def close_displays(runner) -> None:
    """Leave no live bar behind, whatever ended the run."""
    for hook in runner.hooks:
        if isinstance(hook, ProgressHook):
            hook.close()
