"""From a config, and where given a checkpoint, to a model."""
import contextlib
import copy
import inspect
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from mmengine.config import Config

from ewa3d.checks import check_integer
from ewa3d.config_files import find_config, is_checkpoint, read_config
from ewa3d.models.task import TaskModel
from ewa3d.models.weights import num_outputs
from ewa3d.registry import MODELS, nearest

__all__ = ['build', 'fill_from_checkpoint', 'fill_from_data', 'fill_model', 'lacks', 'wanted_from_data',
           'without_pretrained']


def build(config: str | Path | Config | dict, checkpoint: str | Path | None = None,
          num_classes: int | None = None) -> TaskModel:
    """The model of a config, ready to :meth:`~ewa3d.models.task.TaskModel.predict`.

    Args:
        config: path of a config, a name from :func:`ewa3d.list_configs`, a ``Config`` or dict with a ``model``, or the
            model's config itself. A checkpoint that training or fusing wrote will do alone: its config is read as data.
        checkpoint: weights to load, all of them; the model is then in eval mode.
        num_classes: for the head; else the config's value, else that of the checkpoint's data set or weights, else that
            of the config's data, where they are there.

    Raises:
        FileNotFoundError: no such config or checkpoint.
        KeyError: the config has no ``model``. TypeError: something else in place of a config.
        ValueError: ``num_classes`` below 1; the checkpoint is that of another model, or has no config and none is
            given.
    """
    weights = {}
    if not isinstance(config, (str, Path, Config, Mapping)):
        raise TypeError(f'config: a path, a name from ewa3d.list_configs(), a Config or a dict was expected, got '
                        f'{type(config).__name__}')
    if num_classes is not None:
        check_integer('num_classes', num_classes, 1)
    if checkpoint is None and is_checkpoint(config):
        checkpoint = config
    if checkpoint is not None:
        from ewa3d.engine.checkpoint import load_any, read_checkpoint, select_weights
        weights = read_checkpoint(checkpoint)
    whole = _config_dict(config, checkpoint, weights)
    name = 'model' if 'model' in whole else 'the config'
    cfg = whole.get('model', whole)
    if 'type' not in cfg:
        raise KeyError(f"{name} has no 'type'; expected model=dict(type='TaskModel', …), found {sorted(cfg)}")
    if num_classes is not None and 'num_classes' in _parameters(cfg.get('head')):
        cfg['head'].update(num_classes=num_classes)
    fill_from_checkpoint(cfg, weights)
    if weights:
        cfg = without_pretrained(cfg)  # the checkpoint has it all
    metainfo = (weights.get('meta') or {}).get('dataset_meta') or {}
    if not metainfo and config is not checkpoint and (weights or lacks(cfg)):
        metainfo = fill_from_data(whole, cfg)
    if config is checkpoint:
        from ewa3d.fusing import build_stored
        model = build_stored(cfg, checkpoint, select_weights(weights)[0])
    else:
        model = MODELS.build(cfg)
    if weights:
        load_any(model, weights, select_weights(weights)[0], str(checkpoint))
        model.eval()
    if isinstance(model, TaskModel):
        _tell_usage(model, whole, metainfo, weights, str(checkpoint))
    return model


def _config_dict(config, checkpoint, weights: Mapping) -> dict:
    """The config as a dict of its own."""
    if config is checkpoint:
        from ewa3d.fusing import config_of
        return copy.deepcopy(config_of(weights, None, Path(checkpoint)))
    if isinstance(config, (str, Path)):
        config = read_config(find_config(config))
    return config.to_dict() if isinstance(config, Config) else copy.deepcopy(dict(config))


def fill_from_data(whole: Mapping, cfg: MutableMapping) -> Mapping:
    """The metainfo of the config's data, where they are there; what the model's config lacks is filled in from it.

    Args:
        whole: the config. cfg: its model, which is changed.
    """
    from ewa3d.engine.derive import metainfo_of
    for split in ('train', 'val', 'test'):
        metainfo = {}
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, ImportError):  # a model needs no data
            metainfo = metainfo_of(whole.get(f'{split}_dataloader'))
        if metainfo:
            if lacks(cfg):
                fill_model(cfg, metainfo, split)
            return metainfo
    return {}


def lacks(cfg: Mapping) -> bool:
    """Whether something that data can tell is missing in a model's config."""
    branches = [task for task in (cfg.get('tasks') or {}).values() if isinstance(task, Mapping)] or [cfg]
    return any(branch[part].get(key) is None for branch in branches for part, key in wanted_from_data(branch))


def _tell_usage(model: TaskModel, whole: Mapping, metainfo: Mapping, weights: Mapping, name: str) -> None:
    """What the config, or else that in the checkpoint, says about data goes to ``model.usage``."""
    stored = (weights.get('meta') or {}).get('cfg')
    loaders = ('test_dataloader', 'val_dataloader')
    if not any(whole.get(key) for key in loaders) and isinstance(stored, Mapping):
        from ewa3d.fusing import trusted_part
        whole = trusted_part({key: stored[key] for key in (*loaders, 'test_evaluator', 'val_evaluator')
                              if stored.get(key)}, name)
    if any(whole.get(key) for key in loaders):
        from ewa3d.inference import usage_of
        model.usage = usage_of(whole, metainfo)


def without_pretrained(cfg):
    """``cfg`` without the weights that its parts would start from."""
    if isinstance(cfg, Mapping):
        return {key: without_pretrained(value) for key, value in cfg.items() if key not in ('pretrained', 'checkpoint')}
    return [without_pretrained(value) for value in cfg] if isinstance(cfg, (list, tuple)) else cfg


def fill_model(cfg: MutableMapping, metainfo: Mapping, which: str) -> None:
    """Fill in place what a model's config leaves out and a data set knows: the head's ``num_classes`` or ``parts``, the
    neck's ``num_categories``.

    Args:
        metainfo: of the data set, with ``classes`` and, for part segmentation, ``parts``; of a ``MixedDataset``,
            ``sources`` with that of each. which: its name in errors.

    Raises:
        ValueError: the config gives fewer classes than the data have, a task has no data, or data have no task.
    """
    if cfg.get('tasks'):
        _fill_tasks(cfg['tasks'], metainfo, which)
        return
    classes = list(metainfo.get('classes') or [])
    for part, key in wanted_from_data(cfg):
        given = cfg[part].get(key)
        if key == 'parts':
            if given is None and metainfo.get(key):
                cfg[part][key] = {name: list(ids) for name, ids in metainfo[key].items()}
        elif classes:
            if given and given < len(classes):
                raise ValueError(f'model.{part}.{key} is {given}, but the {which} data have {len(classes)} classes '
                                 f'({", ".join(map(str, classes[:5]))}, …); leave it out to take it from the data')
            cfg[part][key] = len(classes) if given is None else given


def _fill_tasks(tasks: Mapping, metainfo: Mapping, which: str) -> None:
    """:func:`fill_model` for every task, from the source that it learns from."""
    sources = metainfo.get('sources')
    wanted = {name: task.get('data') or name for name, task in tasks.items() if isinstance(task, MutableMapping)}
    for name, data in wanted.items():
        if sources is not None and data not in sources:
            raise ValueError(f'model.tasks.{name} has no data: the {which} data have no source {data!r}; '
                             f'{nearest(data, sources)}')
        fill_model(tasks[name], metainfo if sources is None else sources[data], f'{which} ({data})')
    unused = sorted(set(sources or ()) - set(wanted.values()))
    if unused:
        raise ValueError(f'no task of model.tasks learns from {unused[0]!r} of the {which} data; the tasks learn from '
                         f'{", ".join(sorted(set(wanted.values())))}')


def fill_from_checkpoint(cfg: MutableMapping, checkpoint: Mapping) -> None:
    """:func:`fill_model` from the data set that a checkpoint (empty: none) tells, else from its weights."""
    fill_model(cfg, (checkpoint.get('meta') or {}).get('dataset_meta') or {}, "checkpoint's")
    if checkpoint and ('head', 'num_classes') in wanted_from_data(cfg) and cfg['head'].get('num_classes') is None:
        cfg['head']['num_classes'] = num_outputs(checkpoint)


def wanted_from_data(cfg: Mapping) -> list[tuple[str, str]]:
    """The parts of a model's config, and their keywords, that :func:`fill_model` fills in."""
    known = (('head', 'num_classes'), ('head', 'parts'), ('neck', 'num_categories'),
             ('data_preprocessor', 'num_classes'))
    return [(part, key) for part, key in known if key in _parameters(cfg.get(part))]


def _parameters(cfg) -> set[str]:
    """The keywords that the class of a part's config takes."""
    if not isinstance(cfg, Mapping) or 'type' not in cfg:
        return set()
    return set(inspect.signature(MODELS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']).parameters)
