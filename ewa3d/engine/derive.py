"""What follows from a config's data: the number of classes, the metrics there will be, which epoch is reported."""
from collections.abc import Mapping

from ewa3d import registry as R
from ewa3d.datasets.mixed import keywords_of
from ewa3d.models.build import fill_model, wanted_from_data
from ewa3d.registry import nearest

__all__ = ['check_save_best', 'dataset_cfgs', 'fill_num_classes', 'metainfo_of', 'selection']


def dataset_cfgs(loader) -> list[Mapping]:
    """The config of a loader's data set and of those it wraps."""
    found, queue = [], [(loader or {}).get('dataset') if isinstance(loader, Mapping) else None]
    while queue:
        cfg = queue.pop(0)
        if isinstance(cfg, Mapping):
            found.append(cfg)
            queue += [cfg.get('dataset'), *(cfg.get('datasets') or []), *(cfg.get('sources') or {}).values()]
    return found


def metainfo_of(loader) -> Mapping:
    """The metainfo of a loader's data set, where it has ``classes`` or ``sources``; built without reading where that is
    possible."""
    cfgs = dataset_cfgs(loader)
    mixed = [cfg for cfg in cfgs if cfg.get('sources')]
    for cfg in mixed or reversed(cfgs):  # the innermost first: wrappers may copy, or have none
        cls = R.DATASETS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
        lazy = 'lazy_init' in keywords_of(cls)
        metainfo = getattr(R.DATASETS.build({**cfg, 'lazy_init': True} if lazy else dict(cfg)), 'metainfo', None) or {}
        if metainfo.get('classes') or metainfo.get('sources'):
            return metainfo
    return {}


def fill_num_classes(cfg, splits=('train', 'val', 'test')) -> None:
    """Fill what the model takes from the data (``model.head.num_classes`` and the like, see
    :func:`ewa3d.models.build.fill_model`) in place, from the first split that knows its classes.

    Raises:
        ValueError: the config gives fewer classes than the data have.
    """
    model = cfg.get('model')
    if not isinstance(model, Mapping) or not (model.get('tasks') or wanted_from_data(model)):
        return
    for split in splits:
        metainfo = metainfo_of(cfg.get(f'{split}_dataloader'))
        if metainfo:
            fill_model(model, metainfo, split)
            return


def selection(cfg: Mapping) -> tuple[str, str]:
    """How the reported result of a run is chosen: ``('best' | 'last', a sentence that says why)``.

    Raises:
        ValueError: ``save_best`` without a validation split, or on the test split.
    """
    best = ', '.join(_best_metrics(cfg))
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


def _best_metrics(cfg: Mapping) -> list[str]:
    hooks = _hooks(cfg)
    best = next((h['save_best'] for h in hooks if isinstance(h, Mapping) and h.get('save_best')), [])
    return list(map(str, best if isinstance(best, (list, tuple)) else [best]))


def _hooks(cfg: Mapping) -> list:
    return [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or [])]


def _adds_metrics(hook) -> bool:
    kind = hook.get('type') if isinstance(hook, Mapping) else type(hook)
    return getattr(R.HOOKS.get(kind) if isinstance(kind, str) else kind, 'adds_metrics', False)


def check_save_best(cfg: Mapping) -> None:
    """Raise where ``save_best`` is none of the metrics of the validation.

    Asks the classes of the metrics for their ``metric_names``; where one has none, the first evaluation will tell.

    Raises:
        KeyError: names the metric and the nearest ones that there are.
    """
    wanted = [name for name in _best_metrics(cfg) if name != 'auto']
    metrics = cfg.get('val_evaluator')
    metrics = metrics['metrics'] if isinstance(metrics, Mapping) and 'metrics' in metrics else metrics
    if not wanted or metrics is None or any(_adds_metrics(hook) for hook in _hooks(cfg)):
        return
    classes = metainfo_of(cfg.get('val_dataloader')).get('classes') if any('acc/' in n for n in wanted) else None
    known: list[str] = []
    for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
        kind = metric.get('type') if isinstance(metric, Mapping) else type(metric)
        cls = R.METRICS.get(kind) if isinstance(kind, str) else kind
        if 'metric_names' not in vars(cls):  # not inherited: a subclass may give others
            return
        known += cls.metric_names(classes or (), metric.get('prefix') if isinstance(metric, Mapping) else metric.prefix)
    for name in wanted:
        if name not in known and (classes or 'acc/' not in name):
            raise KeyError(f'default_hooks.checkpoint: save_best={name!r} is no metric of the validation; '
                           f'{nearest(name, known)}')
