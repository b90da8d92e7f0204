"""From a config, and where given a checkpoint, to a model."""
import copy
import inspect
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from mmengine.config import Config

from ewa3d.models.task import TaskModel
from ewa3d.models.weights import num_outputs
from ewa3d.registry import MODELS, nearest

__all__ = ['build', 'fill_from_checkpoint', 'fill_model', 'wanted_from_data', 'without_pretrained']


def build(config: str | Path | Config | dict, checkpoint: str | Path | None = None,
          num_classes: int | None = None) -> TaskModel:
    """The model of a config.

    Args:
        config: path of a config, a ``Config`` or dict with a ``model``, or the model's config itself.
        checkpoint: weights to load, all of them; the model is then in eval mode.
        num_classes: for the head; else the config's value, else that of the checkpoint's data set or weights.

    Raises:
        FileNotFoundError: no such config or checkpoint.
        KeyError: the config has no ``model``.
        ValueError: the checkpoint is that of another model.
    """
    if isinstance(config, (str, Path)):
        if not Path(config).is_file():
            raise FileNotFoundError(f'config {config} does not exist')
        config = Config.fromfile(config)
    cfg = config.to_dict() if isinstance(config, Config) else copy.deepcopy(dict(config))
    name = 'model' if 'model' in cfg else 'the config'
    cfg = cfg.get('model', cfg)
    if 'type' not in cfg:
        raise KeyError(f"{name} has no 'type'; expected model=dict(type='TaskModel', …), found {sorted(cfg)}")
    weights = {}
    if checkpoint is not None:
        from ewa3d.engine.checkpoint import load_any, read_checkpoint, select_weights
        weights = read_checkpoint(checkpoint)
    if num_classes and 'num_classes' in _parameters(cfg.get('head')):
        cfg['head'].update(num_classes=num_classes)
    fill_from_checkpoint(cfg, weights)
    if weights:
        cfg = without_pretrained(cfg)  # the checkpoint has it all
    model = MODELS.build(cfg)
    if weights:
        load_any(model, weights, select_weights(weights)[0], str(checkpoint))
        model.eval()
    return model


def without_pretrained(cfg):
    """``cfg`` without the weights that its parts would start from."""
    if isinstance(cfg, Mapping):
        return {key: without_pretrained(value) for key, value in cfg.items()
                if key not in ('pretrained', 'checkpoint')}
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
