"""Checks of a whole config before anything is built: names, types and keywords, each with its dotted path.

mmengine finds a misspelt key when it gets there, which may be after the data were loaded, or never.
"""
import difflib
import inspect
from collections.abc import Mapping

from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, TestLoop, ValLoop

from ewa3d import registry as R
from ewa3d.registry import check_keywords, nearest

__all__ = ['TOP_LEVEL', 'check_config', 'dataset_cfgs', 'fill_num_classes', 'selection']

TOP_LEVEL = {'model', 'work_dir', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg',
             'test_cfg', 'auto_scale_lr', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator',
             'default_hooks', 'custom_hooks', 'data_preprocessor', 'load_from', 'resume', 'launcher', 'env_cfg',
             'log_processor', 'log_level', 'visualizer', 'default_scope', 'randomness', 'experiment_name', 'compile',
             'custom_imports', 'sync_bn', 'find_unused_parameters', 'activation_checkpointing', 'model_wrapper_cfg',
             'efficient_conv_bn_eval', 'runner_type'}
LOADER_KEYS = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn', 'num_batch_per_epoch',
               'disable_subprocess_warning', 'batch_size', 'num_workers', 'pin_memory', 'drop_last', 'timeout',
               'prefetch_factor', 'persistent_workers', 'pin_memory_device', 'in_order', 'multiprocessing_context'}
EXTRA = {'hook': {'priority'}, 'parameter scheduler': {'convert_to_iter_based'},
         'optim_wrapper': {'constructor', 'paramwise_cfg'}}


def check_config(cfg: Mapping, training: bool = True) -> None:
    """Raise when a key, a type or a keyword of ``cfg`` cannot be right, naming its path and the nearest valid names.

    Top-level names that are nothing to the Runner are allowed, because overlays and data paths are such names; one that
    looks like a misspelling is not.

    Raises:
        KeyError: an unknown type, or a misspelt or missing top-level key.
        TypeError: a keyword that the type does not take, or a value of the wrong kind.
    """
    needed = ['model'] + (['train_dataloader', 'train_cfg', 'optim_wrapper'] if training else ['test_dataloader'])
    for key in cfg:
        close = difflib.get_close_matches(key, TOP_LEVEL, n=1, cutoff=0.8)
        if key not in TOP_LEVEL and close:
            raise KeyError(f'config key {key!r} is unknown; did you mean {close[0]!r}?')
    for key in needed:
        if cfg.get(key) is None:
            raise KeyError(f'the config has no {key!r}, which {"training" if training else "testing"} needs; it has '
                           f'{", ".join(sorted(k for k in cfg if not k.startswith("_")))}')
    _walk(cfg['model'], R.MODELS, 'model')
    for split in ('train', 'val', 'test'):
        _check_loader(cfg.get(f'{split}_dataloader'), f'{split}_dataloader')
        _check_loop(cfg.get(f'{split}_cfg'), split)
        if split != 'train':
            _check_evaluator(cfg.get(f'{split}_evaluator'), f'{split}_evaluator')
    if training:
        _check_optimization(cfg)
    for name, hook in (cfg.get('default_hooks') or {}).items():
        _check(hook, R.HOOKS, f'default_hooks.{name}')
    for i, hook in enumerate(cfg.get('custom_hooks') or []):
        _check(hook, R.HOOKS, f'custom_hooks[{i}]')


def _check(cfg, registry, where: str) -> None:
    """Check one ``dict(type=…)``: its type is registered and takes its keywords."""
    if not isinstance(cfg, Mapping):
        return  # an object, or None to switch a default off
    if 'type' not in cfg:
        raise KeyError(f"{where} has no 'type'; {nearest('', registry.names())}")
    try:
        cls = registry.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
        keywords = {k: v for k, v in cfg.items() if k not in EXTRA.get(registry.name, ())}
        check_keywords(cls, keywords)
    except (KeyError, TypeError) as error:
        raise type(error)(f'{where}: {error.args[0]}') from None


def _walk(cfg, registry, where: str) -> None:
    """Check every ``dict(type=…)`` in a tree that one registry builds."""
    if isinstance(cfg, Mapping):
        if isinstance(cfg.get('type'), str):
            _check(cfg, registry, where)
        for key, value in cfg.items():
            if key == 'expand':  # rules: the keywords go to the classmethod `expand`, which checks them
                for i, rule in enumerate(value or []):
                    _check_rule(rule, f'{where}.expand[{i}]')
            elif key != 'init_cfg':
                _walk(value, registry, f'{where}.{key}')
    elif isinstance(cfg, (list, tuple)):
        for i, value in enumerate(cfg):
            _walk(value, registry, f'{where}[{i}]')


def _check_rule(rule, where: str) -> None:
    if not isinstance(rule, Mapping) or 'type' not in rule:
        raise TypeError(f"{where} must be a dict with 'type' and 'at', got {rule!r}")
    try:
        R.MODELS.get(rule['type']) if isinstance(rule['type'], str) else None
    except KeyError as error:
        raise KeyError(f'{where}: {error.args[0]}') from None


def _check_loader(cfg, where: str) -> None:
    if not isinstance(cfg, Mapping):
        return
    for key in cfg:
        if key not in LOADER_KEYS:
            raise TypeError(f'{where} takes no {key!r}; {nearest(key, LOADER_KEYS)}')
    if 'dataset' not in cfg:
        raise KeyError(f"{where} has no 'dataset'")
    _check_dataset(cfg['dataset'], f'{where}.dataset')
    for key in ('sampler', 'batch_sampler'):
        if cfg.get(key) is not None:
            _check(cfg[key], R.SAMPLERS, f'{where}.{key}')


def _check_dataset(cfg, where: str) -> None:
    _check(cfg, R.DATASETS, where)
    if not isinstance(cfg, Mapping):
        return
    for i, transform in enumerate(cfg.get('pipeline') or []):
        _walk(transform, R.TRANSFORMS, f'{where}.pipeline[{i}]')
    if 'dataset' in cfg:
        _check_dataset(cfg['dataset'], f'{where}.dataset')
    for i, child in enumerate(cfg.get('datasets') or []):
        _check_dataset(child, f'{where}.datasets[{i}]')


def _check_loop(cfg, split: str) -> None:
    if not isinstance(cfg, Mapping):
        return
    where = f'{split}_cfg'
    if 'type' in cfg:
        return _check(cfg, R.LOOPS, where)
    if split == 'train':
        loop = EpochBasedTrainLoop if cfg.get('by_epoch', True) else IterBasedTrainLoop
    else:
        loop = ValLoop if split == 'val' else TestLoop
    accepted = set(inspect.signature(loop.__init__).parameters) - {'self', 'runner', 'dataloader', 'evaluator'}
    accepted |= {'by_epoch'} if split == 'train' else set()
    for key in cfg:
        if key not in accepted:
            raise TypeError(f'{where} takes no {key!r}; {nearest(key, accepted)}')


def _check_evaluator(cfg, where: str) -> None:
    if isinstance(cfg, Mapping) and 'metrics' in cfg:
        cfg, where = cfg['metrics'], f'{where}.metrics'
    for i, metric in enumerate(cfg if isinstance(cfg, (list, tuple)) else [cfg]):
        _check(metric, R.METRICS, f'{where}[{i}]' if isinstance(cfg, (list, tuple)) else where)


def _check_optimization(cfg: Mapping) -> None:
    wrapper = cfg['optim_wrapper']
    if isinstance(wrapper, Mapping) and 'optimizer' in wrapper:
        _check({'type': 'OptimWrapper', **wrapper}, R.OPTIM_WRAPPERS, 'optim_wrapper')
        _check(wrapper['optimizer'], R.OPTIMIZERS, 'optim_wrapper.optimizer')
        if 'constructor' in wrapper:
            _check(dict(type=wrapper['constructor']), R.OPTIM_WRAPPER_CONSTRUCTORS, 'optim_wrapper.constructor')
    elif isinstance(wrapper, Mapping) and 'constructor' not in wrapper:
        raise KeyError(f"optim_wrapper has no 'optimizer'; {nearest('optimizer', wrapper)}")
    schedulers = cfg.get('param_scheduler')
    for i, scheduler in enumerate(schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]):
        where = f'param_scheduler[{i}]' if isinstance(schedulers, (list, tuple)) else 'param_scheduler'
        if isinstance(scheduler, Mapping) and 'type' in scheduler:
            _check(scheduler, R.PARAM_SCHEDULERS, where)


# ---------------------------------------------------------------------------------------------------------------------
# What follows from the data
# ---------------------------------------------------------------------------------------------------------------------
def dataset_cfgs(loader) -> list[Mapping]:
    """The config of a loader's data set and of those it wraps."""
    found, queue = [], [(loader or {}).get('dataset') if isinstance(loader, Mapping) else None]
    while queue:
        cfg = queue.pop(0)
        if isinstance(cfg, Mapping):
            found.append(cfg)
            queue += [cfg.get('dataset'), *(cfg.get('datasets') or [])]
    return found


def _classes_of(loader) -> list | None:
    """``metainfo['classes']`` of a loader's data set, built without reading the data where it can be."""
    for cfg in reversed(dataset_cfgs(loader)):  # the innermost first: wrappers may copy, or have none
        cls = R.DATASETS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
        lazy = 'lazy_init' in inspect.signature(cls.__init__).parameters
        metainfo = getattr(R.DATASETS.build({**cfg, 'lazy_init': True} if lazy else dict(cfg)), 'metainfo', None) or {}
        if metainfo.get('classes'):
            return list(metainfo['classes'])
    return None


def fill_num_classes(cfg, splits=('train', 'val', 'test')) -> None:
    """Fill ``model.head.num_classes`` in place from the first split that knows its classes.

    Raises:
        ValueError: the config gives fewer classes than the data have.
    """
    head = (cfg.get('model') or {}).get('head')
    if not isinstance(head, Mapping) or 'type' not in head:
        return
    cls = R.MODELS.get(head['type']) if isinstance(head['type'], str) else head['type']
    if 'num_classes' not in inspect.signature(cls.__init__).parameters:
        return
    for split in splits:
        classes = _classes_of(cfg.get(f'{split}_dataloader'))
        if classes:
            given = head.get('num_classes')
            if given is not None and given < len(classes):
                raise ValueError(f'model.head.num_classes is {given}, but the {split} data have {len(classes)} classes '
                                 f'({", ".join(map(str, classes[:5]))}, …); leave it out to take it from the data')
            head['num_classes'] = given or len(classes)
            return


def selection(cfg: Mapping) -> tuple[str, str]:
    """How the reported result of a run is chosen: ``('best' | 'last', a sentence that says why)``.

    Raises:
        ValueError: ``save_best`` without a validation split, or on the test split.
    """
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]
    best = next((h['save_best'] for h in hooks if isinstance(h, Mapping) and h.get('save_best')), None)
    if cfg.get('val_dataloader') is None:
        if best:
            raise ValueError(f'default_hooks.checkpoint: save_best={best!r} needs a val_dataloader')
        return 'last', 'no validation split is configured: the last epoch is what is reported'
    val, test = dataset_cfgs(cfg['val_dataloader']), dataset_cfgs(cfg.get('test_dataloader'))
    is_test = any(c.get('split') == 'test' for c in val) or (bool(test) and val[:1] == test[:1])
    if is_test:
        if best:
            raise ValueError(f'default_hooks.checkpoint: save_best={best!r} would choose the epoch on the test split; '
                             'validate on a split of the training data, or leave save_best out')
        return 'last', 'only a test split exists: it is watched, and the last epoch is what is reported'
    if best:
        return 'best', f'the best epoch by {best} on the validation split is kept as best_*.pth'
    return 'last', 'a validation split is watched without save_best: the last epoch is what is reported'
