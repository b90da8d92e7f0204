"""Checks of a whole config before anything is built: names, types and keywords, each with its dotted path.

mmengine finds a misspelt key when it gets there, which may be after the data were loaded, or never.
"""
import contextlib
import difflib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, LogProcessor, TestLoop, ValLoop
from torch import Tensor, compile, nn

from ewa3d import registry as R
from ewa3d.checks import is_integer, is_number
from ewa3d.engine.parallel import RULES
from ewa3d.engine.sharding import FULLY_SHARD, shard
from ewa3d.registry import check_keywords, nearest
from ewa3d.reparam import RULE_KEYS

__all__ = ['TOP_LEVEL', 'check_config']

TOP_LEVEL = {'model', 'work_dir', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg', 'val_cfg',
             'test_cfg', 'auto_scale_lr', 'optim_wrapper', 'param_scheduler', 'val_evaluator', 'test_evaluator',
             'default_hooks', 'custom_hooks', 'data_preprocessor', 'load_from', 'resume', 'launcher', 'env_cfg',
             'log_processor', 'log_level', 'visualizer', 'default_scope', 'randomness', 'experiment_name', 'compile',
             'custom_imports', 'sync_bn', 'find_unused_parameters', 'activation_checkpointing', 'model_wrapper_cfg',
             'efficient_conv_bn_eval', 'runner_type'}
LOADER_KEYS = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn', 'num_batch_per_epoch',
               'disable_subprocess_warning', 'batch_size', 'num_workers', 'pin_memory', 'drop_last', 'timeout',
               'prefetch_factor', 'persistent_workers', 'pin_memory_device', 'in_order', 'multiprocessing_context'}
# What stands at the top: a dict, or one of a dict and a list.
KINDS = {**{f'{split}_{part}': (dict,) for split in ('train', 'val', 'test') for part in ('dataloader', 'cfg')},
         **dict.fromkeys(('model', 'optim_wrapper', 'default_hooks', 'visualizer'), (dict,)),
         **dict.fromkeys(('val_evaluator', 'test_evaluator', 'param_scheduler'), (dict, list)),
         'custom_hooks': (list,), 'activation_checkpointing': (list, str)}
# Dictionaries without a type, by dotted path.
SECTIONS = {'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit'),
            'env_cfg.mp_cfg': ('mp_start_method', 'opencv_num_threads'),
            'randomness': ('seed', 'diff_rank_seed', 'deterministic'),
            'auto_scale_lr': ('base_batch_size', 'enable', 'rule'),
            'compile': tuple(inspect.signature(compile).parameters)[1:],
            'log_processor': ('type', *tuple(inspect.signature(LogProcessor).parameters))}
# mmengine's own constructor reads its `paramwise_cfg` key by key and never says that one is unknown.
DEFAULT_PARAMWISE = ('custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult',
                     'dwconv_decay_mult', 'dcn_offset_lr_mult', 'bypass_duplicate')
COUNT, PERIOD = 'a positive integer', 'a positive integer, or -1 for never'
LOADER_RANGES = dict(batch_size=COUNT)
LOOP_RANGES = dict(max_epochs=COUNT, max_iters=COUNT, val_interval=COUNT)
HOOK_RANGES = dict(interval=PERIOD, max_keep_ckpts='a positive integer, or -1 for all')
EXTRA = {'hook': {'priority'}, 'parameter scheduler': {'convert_to_iter_based'},
         'optim_wrapper': {'constructor', 'paramwise_cfg'}}


def check_config(cfg: Mapping, training: bool = True) -> None:
    """Raise when a key, a type or a keyword of ``cfg`` cannot be right, naming its path and the nearest valid names.

    Top-level names that are nothing to the Runner are allowed, because overlays and data paths are such names; one that
    looks like a misspelling is not.

    Raises:
        KeyError: an unknown type, or a misspelt or missing top-level key.
        TypeError: a keyword that the type does not take, or a value of the wrong kind.
        ValueError: a number out of its range.
    """
    needed = ['model'] + (['train_dataloader', 'train_cfg', 'optim_wrapper'] if training else ['test_dataloader'])
    for key in cfg:
        close = difflib.get_close_matches(key, TOP_LEVEL, n=1, cutoff=0.8)
        if key not in TOP_LEVEL and close:
            raise KeyError(f'config key {key!r} is unknown; did you mean {close[0]!r}?')
    for key, kinds in KINDS.items():
        _expect(cfg.get(key), key, *kinds)
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
    if cfg.get('optim_wrapper') is not None:
        _check_optimization(cfg)
    hooks = {f'default_hooks.{name}': hook for name, hook in (cfg.get('default_hooks') or {}).items()}
    hooks |= {f'custom_hooks[{i}]': hook for i, hook in enumerate(cfg.get('custom_hooks') or [])}
    for where, hook in hooks.items():
        _check(hook, R.HOOKS, where)
        if isinstance(hook, Mapping):
            _check_ranges(hook, where, HOOK_RANGES)
            _check_pipeline(hook, where)
            for key in ('train_dataloader', 'test_dataloader'):
                _check_loader(hook.get(key), f'{where}.{key}')
    for where, keys in SECTIONS.items():
        _check_section(cfg, where, keys)
    _check_ranks(cfg)
    if isinstance(cfg.get('visualizer'), Mapping):
        _check(cfg['visualizer'], R.VISUALIZERS, 'visualizer')


def _check_ranks(cfg: Mapping) -> None:
    """What belongs to runs of several processes."""
    scaling = cfg.get('auto_scale_lr') or {}
    _check_ranges(scaling, 'auto_scale_lr', dict(base_batch_size=COUNT))
    if scaling.get('enable') and scaling.get('base_batch_size') is None:
        raise KeyError('auto_scale_lr has no base_batch_size, for which the learning rate of the config is meant')
    _choice(scaling.get('rule', 'linear'), 'auto_scale_lr.rule', RULES)
    if cfg.get('sync_bn') is not None:
        _choice(cfg['sync_bn'], 'sync_bn', ('torch',))
    wrapper = cfg.get('model_wrapper_cfg')
    _expect(wrapper, 'model_wrapper_cfg', dict)
    if isinstance(wrapper, Mapping) and wrapper.get('type') == 'MMFullyShardedDataParallel':
        raise ValueError("model_wrapper_cfg.type='MMFullyShardedDataParallel' flattens parameters, so that neither "
                         f"experts can be averaged nor checkpoints be read elsewhere; use {FULLY_SHARD!r}")
    if isinstance(wrapper, Mapping) and wrapper.get('type') == FULLY_SHARD:
        _check_names(wrapper, {'type', *list(inspect.signature(shard).parameters)[1:]}, 'model_wrapper_cfg')
        hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]
        several = (cfg.get('optim_wrapper') or {}).get('accumulative_counts', 1) > 1
        for where, found in (('sync_bn', cfg.get('sync_bn')), ('compile', cfg.get('compile')),
                             ('optim_wrapper.accumulative_counts', several),
                             ('EMAHook', any(isinstance(h, Mapping) and h.get('type') == 'EMAHook' for h in hooks))):
            if found:
                raise ValueError(f'{where} does not go together with model_wrapper_cfg.type={FULLY_SHARD!r}')


def _choice(value, where: str, accepted) -> None:
    if value not in tuple(accepted):
        raise ValueError(f'{where} is {value!r}; {" or ".join(map(repr, accepted))} was expected')


def _expect(value, where: str, *kinds: type) -> None:
    """Raise where plain data are neither of ``kinds`` (dict, list); ``None`` and objects pass."""
    found = dict if isinstance(value, Mapping) else list if isinstance(value, (list, tuple)) else type(value)
    if found in kinds or found not in (dict, list, str, bool, int, float):
        return
    raise TypeError(f'{where} is {value!r}; {" or ".join(f"a {kind.__name__}" for kind in kinds)} was expected')


def _check(cfg, registry, where: str) -> None:
    """Check one ``dict(type=…)``: its type is registered and takes its keywords; numbers are numbers."""
    _expect(cfg, where, dict)
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
    check_numbers(cls, keywords, where)


def _walk(cfg, registry, where: str) -> None:
    """Check every ``dict(type=…)`` in a tree that one registry builds."""
    if isinstance(cfg, Mapping):
        if isinstance(cfg.get('type'), str):
            _check(cfg, registry, where)
        for key, value in cfg.items():
            if key == 'expand':  # rules: the keywords go to the classmethod `expand`, which checks them
                _expect(value, f'{where}.expand', dict, list)
                for i, rule in enumerate([value] if isinstance(value, Mapping) else value or []):
                    _check_rule(rule, f'{where}.expand[{i}]')
            elif key != 'init_cfg':
                _walk(value, registry, f'{where}.{key}')
    elif isinstance(cfg, (list, tuple)):
        for i, value in enumerate(cfg):
            _walk(value, registry, f'{where}[{i}]')


def _check_rule(rule, where: str) -> None:
    """Check a rule of ``expand``; its keywords go to the classmethod ``expand`` of its type."""
    _expect(rule, where, dict)
    if not isinstance(rule, Mapping) or not {'type', 'at'} <= set(rule):
        raise TypeError(f"{where} must be a dict with 'type' and 'at', got {rule!r}")
    try:
        cls = R.MODELS.get(rule['type']) if isinstance(rule['type'], str) else rule['type']
    except KeyError as error:
        raise KeyError(f'{where}: {error.args[0]}') from None
    if not hasattr(cls, 'expand'):
        raise TypeError(f'{where}: {rule["type"]!r} has no classmethod expand: it is no Reparam')
    parameters = list(inspect.signature(cls.expand).parameters.values())[1:]  # the first is the plain module
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        _check_names(rule, {*RULE_KEYS, *(p.name for p in parameters)}, where)
    check_numbers(cls.expand, rule, where)


def _check_names(cfg: Mapping, accepted, where: str) -> None:
    for key in cfg:
        if key not in accepted:
            raise TypeError(f'{where} takes no {key!r}; {nearest(key, accepted)}')


def _check_section(cfg: Mapping, where: str, keys) -> None:
    first, *rest = where.split('.')
    section = cfg.get(first)  # a Config is no Mapping, what is in it is
    for name in rest:
        section = section.get(name) if isinstance(section, Mapping) else None
    if section is not None and not (where == 'compile' and isinstance(section, bool)):
        if not isinstance(section, Mapping):
            raise TypeError(f'{where} is {section!r}; a dict was expected')
        _check_names(section, keys, where)


def _check_ranges(cfg: Mapping, where: str, ranges: Mapping[str, str]) -> None:
    for key, expected in ranges.items():
        value = cfg.get(key)
        if value is None:
            continue
        if not (is_integer(value) and (value > 0 or (value == -1 and '-1' in expected))):
            raise ValueError(f'{where}.{key} is {value!r}; {expected} was expected')


_NAMED = {int: 'an integer', float: 'a number', bool: 'True or False', Tensor: 'a tensor', dict: 'a dict',
          nn.Module: 'a module', type(None): 'None'}


def check_numbers(function: Any, cfg: Mapping, where: str) -> None:
    """Raise where a parameter that is annotated as a number, or as a dict, gets something else.

    Raises:
        TypeError: names the path, the value and what was expected.
    """
    parameters: dict = {}
    for owner in reversed(function.__mro__ if inspect.isclass(function) else [function]):
        with contextlib.suppress(TypeError, ValueError, NameError):  # C code, or annotations that do not resolve
            target = owner.__dict__.get('__init__', owner) if inspect.isclass(owner) else owner
            parameters |= inspect.signature(target, eval_str=True).parameters
    for key, value in cfg.items():
        hint = parameters[key].annotation if key in parameters else Any
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        if not all(kind in _NAMED for kind in kinds) or (value is None and parameters[key].default is None):
            continue
        accepted = (*kinds, *((int,) if {float, bool} & set(kinds) else ()))
        if not isinstance(value, accepted):
            expected = ' or '.join(_NAMED[kind] for kind in kinds)
            raise TypeError(f'{where}.{key} is {value!r}; {expected} was expected')


def _check_loader(cfg, where: str) -> None:
    if not isinstance(cfg, Mapping):
        return
    _check_names(cfg, LOADER_KEYS, where)
    _check_ranges(cfg, where, LOADER_RANGES)
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
    for key in ('pipeline', 'datasets'):
        _expect(cfg.get(key), f'{where}.{key}', list)
    _check_pipeline(cfg, where)
    for key in ('dataset', 'base'):
        if cfg.get(key) is not None:
            _check_dataset(cfg[key], f'{where}.{key}')
    for i, child in enumerate(cfg.get('datasets') or []):
        _check_dataset(child, f'{where}.datasets[{i}]')
    _expect(cfg.get('sources'), f'{where}.sources', dict)
    for name, child in (cfg.get('sources') or {}).items():
        _check_dataset(child, f'{where}.sources.{name}')


def _check_pipeline(cfg: Mapping, where: str) -> None:
    for i, transform in enumerate(cfg.get('pipeline') or []):
        _expect(transform, f'{where}.pipeline[{i}]', dict)
        _walk(transform, R.TRANSFORMS, f'{where}.pipeline[{i}]')


def _check_loop(cfg, split: str) -> None:
    if not isinstance(cfg, Mapping):
        return
    where = f'{split}_cfg'
    _check_ranges(cfg, where, LOOP_RANGES)
    if 'type' in cfg:
        return _check(cfg, R.LOOPS, where)
    if split == 'train':
        loop = EpochBasedTrainLoop if cfg.get('by_epoch', True) else IterBasedTrainLoop
    else:
        loop = ValLoop if split == 'val' else TestLoop
    accepted = set(inspect.signature(loop.__init__).parameters) - {'self', 'runner', 'dataloader', 'evaluator'}
    accepted |= {'by_epoch'} if split == 'train' else set()
    _check_names(cfg, accepted, where)


def _check_evaluator(cfg, where: str) -> None:
    if isinstance(cfg, Mapping) and 'metrics' in cfg:
        cfg, where = cfg['metrics'], f'{where}.metrics'
    for i, metric in enumerate(cfg if isinstance(cfg, (list, tuple)) else [cfg]):
        _check(metric, R.METRICS, f'{where}[{i}]' if isinstance(cfg, (list, tuple)) else where)


def _check_optimization(cfg: Mapping) -> None:
    wrapper = cfg['optim_wrapper']
    if isinstance(wrapper, Mapping) and 'optimizer' in wrapper:
        _check({'type': 'OptimWrapper', **wrapper}, R.OPTIM_WRAPPERS, 'optim_wrapper')
        _check_ranges(wrapper, 'optim_wrapper', dict(accumulative_counts=COUNT))
        _check_optimizer(wrapper['optimizer'], 'optim_wrapper.optimizer')
        _check_clipping(wrapper.get('clip_grad'), 'optim_wrapper.clip_grad')
        _check_constructor(wrapper)
    elif isinstance(wrapper, Mapping) and 'constructor' not in wrapper:
        raise KeyError(f"optim_wrapper has no 'optimizer'; {nearest('optimizer', wrapper)}")
    schedulers = cfg.get('param_scheduler')
    for i, scheduler in enumerate(schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]):
        where = f'param_scheduler[{i}]' if isinstance(schedulers, (list, tuple)) else 'param_scheduler'
        _expect(scheduler, where, dict)
        if isinstance(scheduler, Mapping) and 'type' in scheduler:
            _check(scheduler, R.PARAM_SCHEDULERS, where)


def _check_optimizer(cfg, where: str) -> None:
    _check(cfg, R.OPTIMIZERS, where)
    for key in ('lr', 'weight_decay') if isinstance(cfg, Mapping) else ():
        value = cfg.get(key, 0)
        if not (is_number(value) or isinstance(value, Tensor)) or not value >= 0:
            raise ValueError(f'{where}.{key} is {value!r}; a number from 0 on was expected')


def _check_clipping(cfg, where: str) -> None:
    if isinstance(cfg, Mapping) and cfg.get('type', 'norm') in ('norm', 'value'):
        function = getattr(nn.utils, f'clip_grad_{cfg.get("type", "norm")}_')
        _check_names(cfg, {'type', *list(inspect.signature(function).parameters)[1:]}, where)
        check_numbers(function, cfg, where)


def _check_constructor(wrapper: Mapping) -> None:
    name = wrapper.get('constructor', 'DefaultOptimWrapperConstructor')
    _check(dict(type=name), R.OPTIM_WRAPPER_CONSTRUCTORS, 'optim_wrapper.constructor')
    cls = R.OPTIM_WRAPPER_CONSTRUCTORS.get(name) if isinstance(name, str) else name
    _expect(wrapper.get('paramwise_cfg'), 'optim_wrapper.paramwise_cfg', dict)
    keys = getattr(cls, 'KEYS', DEFAULT_PARAMWISE if cls is DefaultOptimWrapperConstructor else None)
    if keys is not None and wrapper.get('paramwise_cfg'):
        _check_names(wrapper['paramwise_cfg'], keys, 'optim_wrapper.paramwise_cfg')
