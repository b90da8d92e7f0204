"""From a config, and where given a checkpoint, to a model."""
import copy
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config

from ewa3d.models.task import TaskModel
from ewa3d.registry import MODELS

__all__ = ['build']


def build(config: str | Path | Config | dict, checkpoint: str | Path | None = None,
          num_classes: int | None = None) -> TaskModel:
    """The model of a config.

    Args:
        config: path of a config, a ``Config`` or dict with a ``model``, or the model's config itself.
        checkpoint: weights to load, all of them; the model is then in eval mode.
        num_classes: for the head; else the config's value, else that of the checkpoint's data set.

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
    head = cfg.get('head')
    if isinstance(head, Mapping):
        head.update(num_classes=num_classes or head.get('num_classes') or _classes_of(weights))
    if weights:
        cfg = _without_pretrained(cfg)  # the checkpoint has it all
    model = MODELS.build(cfg)
    if weights:
        load_any(model, weights, select_weights(weights)[0], str(checkpoint))
        model.eval()
    return model


def _without_pretrained(cfg):
    """``cfg`` without the weights that its parts would start from."""
    if isinstance(cfg, Mapping):
        return {key: _without_pretrained(value) for key, value in cfg.items() if key != 'pretrained'}
    return [_without_pretrained(value) for value in cfg] if isinstance(cfg, (list, tuple)) else cfg


def _classes_of(checkpoint: Mapping) -> int | None:
    classes = ((checkpoint.get('meta') or {}).get('dataset_meta') or {}).get('classes')
    return len(classes) if classes else None
