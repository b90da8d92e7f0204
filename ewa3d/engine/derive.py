"""What follows from a config's data: the number of classes, the metrics there will be, which epoch is reported."""
import inspect
from collections.abc import Mapping

from ewa3d import registry as R

__all__ = ['dataset_cfgs', 'fill_num_classes', 'selection']


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
    best = ', '.join(map(str, best)) if isinstance(best, (list, tuple)) else best
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
