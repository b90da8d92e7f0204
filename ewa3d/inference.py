"""From clouds, images and clips as people have them to what a model says about them.

What a model needs to know for it, :func:`ewa3d.build` takes from the config and the checkpoint: the test pipeline, the
names of the classes, how boxes are chosen. A sample is prepared as the config's data set would prepare it.
"""
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ewa3d import registry as R
from ewa3d.checks import check_integer, check_number, is_integer
from ewa3d.datasets.base import PointDataset, build_transform
from ewa3d.datasets.cache import prepared_rows
from ewa3d.datasets.images import ImageDataset
from ewa3d.datasets.scenes import SceneDataset
from ewa3d.datasets.transforms import take
from ewa3d.datasets.videos import ClipDataset
from ewa3d.engine.derive import dataset_cfgs
from ewa3d.predictions import Prediction, prediction_of
from ewa3d.registry import nearest
from ewa3d.structures import Sample

__all__ = ['Usage', 'originals', 'predict', 'prepare', 'usage_of']


# ---------------------------------------------------------------------------------------------------------------------
# What a config says about the use of its model
# ---------------------------------------------------------------------------------------------------------------------
class Usage(NamedTuple):
    """How a model's input is prepared, and what its output is called.

    Attributes:
        pipeline: transforms of the test, as configs.
        metainfo: of the data set: ``classes``, ``parts``, ``up_axis``, …
        dataset: its class, which says whether samples are clouds, scenes, images or clips.
        max_points: the data set keeps so many points of a cloud, in FPS order; ``None``: all, as they come.
        boxes: keywords of :class:`ewa3d.evaluation_boxes.BoxAP`, by whose rules boxes are kept.
    """
    pipeline: Sequence = ()
    metainfo: Mapping = {}
    dataset: type = PointDataset
    max_points: int | None = None
    boxes: Mapping = {}


def usage_of(cfg: Mapping, dataset_meta: Mapping | None = None) -> dict[str | None, Usage]:
    """What a whole config says, by the source of the data (``None`` where there is one).

    Args:
        dataset_meta: metainfo that is known; by default that of the data set's class.
    """
    loader = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    known = dataset_meta or {}
    found = {}
    for wrapper in dataset_cfgs(loader):
        sources = wrapper.get('sources')
        if sources:
            return {name: _usage([source], cfg, (known.get('sources') or {}).get(name) or {})
                    for name, source in sources.items() if isinstance(source, Mapping)}
    usage = _usage(dataset_cfgs(loader), cfg, known)
    if usage.pipeline:
        found[None] = usage
    return found


def _usage(cfgs: Sequence[Mapping], cfg: Mapping, known: Mapping) -> Usage:
    inner = next((c for c in cfgs if c.get('pipeline')), None)
    if inner is None:
        return Usage()
    cls = R.DATASETS.get(inner['type']) if isinstance(inner['type'], str) else inner['type']
    max_points = inspect.signature(cls).parameters.get('max_points')
    metainfo = {**getattr(cls, 'METAINFO', {}), **(inner.get('metainfo') or {}), **known}
    evaluators = cfg.get('test_evaluator') or cfg.get('val_evaluator') or ()
    evaluators = [evaluators] if isinstance(evaluators, Mapping) else evaluators
    boxes = next((e for e in evaluators if isinstance(e, Mapping) and e.get('type') == 'BoxAP'), {})
    return Usage(list(inner['pipeline']), metainfo, cls,
                 None if max_points is None else inner.get('max_points', max_points.default),
                 {key: value for key, value in boxes.items() if key != 'type'})


def _chosen(model: nn.Module, task: str | None, pipeline: Sequence | None) -> tuple[Usage, str | None]:
    """The usage for a task, and the source that its samples are of."""
    usages = getattr(model, 'usage', None) or {}
    source = None
    if getattr(model, 'tasks', None) is not None:
        names = list(model.tasks)
        if task is None and len(names) > 1:
            raise ValueError(f'the model has the tasks {", ".join(names)}; say which: task={names[0]!r}')
        if task is not None and task not in names:
            raise ValueError(f'the model has no task {task!r}; {nearest(task, names)}')
        source = model.tasks[task or names[0]].data
    elif task is not None:
        raise ValueError(f'task={task!r}: the model has one task, without a name')
    usage = usages.get(source) or usages.get(None) or Usage()
    if pipeline is not None:
        usage = usage._replace(pipeline=list(pipeline))
    if not usage.pipeline:
        raise ValueError('the model was built without a test pipeline: build it from a whole config, or from a '
                         "checkpoint that holds one; or give pipeline=[dict(type='Normalize'), …, dict(type='Pack')]")
    return usage, source


# ---------------------------------------------------------------------------------------------------------------------
# What goes in
# ---------------------------------------------------------------------------------------------------------------------
class _Given:
    """A data set of what was given."""

    def __init__(self, entries: list[dict], pipeline: Sequence, metainfo: Mapping, columns: int | None, **kwargs):
        self.entries, self.columns = entries, columns
        super().__init__(split=None, pipeline=pipeline, metainfo=dict(metainfo), cache_dir=None, **kwargs)

    def load_data_list(self) -> list[dict]:
        return self.entries


class _Clouds(_Given, PointDataset):
    """Clouds, with as many columns as the model takes: of a file the first ones, of an array all."""
    kind, key, ndim, shape = 'cloud', 'points', 2, 'N, 3+F'

    def load_cloud(self, entry: dict) -> dict:
        if 'path' in entry:
            if Path(entry['path']).is_dir():
                raise IsADirectoryError(f'{entry["path"]} is a folder; a file was expected')
            points = self._read_path(entry['path'])
            return dict(points=points[:, :self.columns])
        if self.columns is not None and entry['points'].shape[1] != self.columns:
            raise ValueError(f'{entry["name"]}: the model takes points (N, {self.columns}), got '
                             f'{entry["points"].shape}')
        return {}


class _Images(_Given, ImageDataset):
    kind, key, ndim, shape = 'image', 'img', 3, 'H, W, C'

    def __init__(self, *args, columns: int | None):
        super().__init__(*args, columns=columns, mode='L' if columns == 1 else 'RGB')


class _Clips(_Given, ClipDataset):
    kind, key, ndim, shape = 'clip', 'video', 4, 'T, H, W, 3'


def _given_class(usage: Usage) -> type:
    for base, given in ((ClipDataset, _Clips), (ImageDataset, _Images)):
        if issubclass(usage.dataset, base):
            return given
    return _Clouds


def _entries(given, cls: type) -> tuple[list[dict], bool]:
    """The samples in what was given, and whether it is one alone."""
    key, kind = cls.key, cls.kind
    if isinstance(given, Mapping):
        raise TypeError(f'a {kind}, a path or a list of them was expected, got a dict; inputs of the model itself, '
                        'dict(points=…), go to model(inputs)')
    if isinstance(given, (str, Path)):
        return [dict(path=Path(given).expanduser(), name=str(given))], True
    single = not isinstance(given, (list, tuple)) or _is_numbers(given)
    items = [given] if single else given
    entries = []
    for i, item in enumerate(items):
        name = f'{kind} {i}'
        if isinstance(item, (str, Path)):
            entries.append(dict(path=Path(item).expanduser(), name=str(item)))
            continue
        array = _array(item, name, cls)
        if single and array.ndim == cls.ndim + 1:
            return [{key: one, 'name': f'{kind} {j}'} for j, one in enumerate(array)], False
        if array.ndim != cls.ndim:
            batch = f', or a batch (B, {cls.shape})' if single else ''
            raise ValueError(f'{name}: a {kind} has the shape ({cls.shape}){batch}, got {array.shape}')
        entries.append({key: array, 'name': name})
    return entries, single


def _is_numbers(given: Sequence) -> bool:
    """Whether nested lists hold numbers: one cloud, or a batch."""
    while isinstance(given, (list, tuple)) and given:
        given = given[0]
    return isinstance(given, (int, float, np.number))


def _array(item, name: str, cls: type) -> np.ndarray:
    if isinstance(item, Tensor):
        item = item.detach().cpu()
        item = (item.float() if item.dtype in (torch.bfloat16, torch.float16) else item).numpy()
        return np.moveaxis(item, -3, -1) if cls is not _Clouds and item.ndim >= cls.ndim else item  # channels last
    try:
        array = np.asarray(item)
    except ValueError as error:  # rows of different lengths
        raise ValueError(f'{name}: {error}') from error
    if array.dtype.kind not in 'fiu':
        what = f'an array of {array.dtype}' if isinstance(item, np.ndarray) or array.ndim else type(item).__name__
        raise TypeError(f'{name}: an array of numbers or a path was expected, got {what}')
    return array[..., None] if cls is _Images and array.ndim == 2 else array


def _prelude(usage: Usage) -> Callable[[dict], dict]:
    """The first step of the pipeline: what a data set does to its clouds before."""
    def start(results: dict) -> dict:
        results['rng'] = np.random.default_rng(0)  # the same alone and among others
        if 'points' not in results:
            return results
        results.update(all_points=results['points'][:, :3], rows=np.arange(len(results['points'])))
        if usage.max_points is not None:
            take(results, prepared_rows(results['points'], usage.max_points), fps_ordered=True)
        if issubclass(usage.dataset, SceneDataset):
            results.update(boxes=np.zeros((0, 7), np.float32), box_labels=np.zeros(0, np.int64))
        return results

    return start


def _steps(usage: Usage) -> list:
    """The pipeline without what needs labels; clouds that are too small repeat points."""
    steps = [_prelude(usage)]
    for step in usage.pipeline:
        kind = step.get('type') if isinstance(step, Mapping) else type(step).__name__
        if kind == 'KeepAll':
            continue
        step = build_transform(dict(step) if isinstance(step, Mapping) else step)
        if kind == 'Resample':
            step.pad = step.pad or 'repeat'
        steps.append(step)
    return steps


def _columns(model: nn.Module, usage: Usage) -> int | None:
    """How many columns the clouds (channels the images) have that the pipeline is given; ``None`` where the model does
    not tell."""
    tokenizer = getattr(getattr(model, 'backbone', None), 'tokenizer', None)
    if isinstance(tokenizer, nn.ModuleDict):
        tokenizer = dict(tokenizer).get(_given_class(usage).key)
    columns = getattr(tokenizer, 'in_channels', None)
    kinds = [step.get('type') if isinstance(step, Mapping) else type(step).__name__ for step in usage.pipeline]
    return None if columns is None else columns - kinds.count('AddHeight')


def _categories(category, count: int, usage: Usage, model: nn.Module) -> list[int | None]:
    """The number of the category of each cloud."""
    names = list(usage.metainfo.get('classes') or ())
    told = getattr(getattr(model, 'neck', None), 'num_categories', None)
    if category is None:
        if told:
            known = f': {", ".join(names)}' if names else f', 0 to {told - 1}'
            raise ValueError(f'the model is told the category of each cloud; give category=… (a name or number, or a '
                             f'list of them){known}')
        return [None] * count
    given = list(category) if isinstance(category, (list, tuple, np.ndarray, Tensor)) else [category] * count
    if len(given) != count:
        raise ValueError(f'category: {count} were expected, one a cloud, got {len(given)}')
    return [_category(value, names, told or len(names)) for value in given]


def _category(value, names: Sequence[str], count: int) -> int:
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f'there is no category {value!r}; {nearest(value, names)}')
        return names.index(value)
    value = value.item() if isinstance(value, Tensor) else value
    if not is_integer(value) or not 0 <= value < (count or value + 1):
        raise ValueError(f'category: a name, or a number from 0 to {count - 1}, was expected, got {value!r}')
    return int(value)


# ---------------------------------------------------------------------------------------------------------------------
# Through the model
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(model: nn.Module, given, category, task: str | None, pipeline: Sequence | None,
             batch_size: int) -> tuple[Iterator[tuple[dict, list[Sample], list]], Usage, bool]:
    check_integer('batch_size', batch_size, 1)
    usage, source = _chosen(model, task, pipeline)
    cls = _given_class(usage)
    entries, single = _entries(given, cls)
    for entry, label in zip(entries, _categories(category, len(entries), usage, model)):
        entry['label'] = label
    if not entries:
        return iter(()), usage, False
    metainfo = {key: usage.metainfo[key] for key in ('up_axis', 'normals') if key in usage.metainfo}
    data = cls(entries, _steps(usage), metainfo, columns=_columns(model, usage))

    def batches():
        group = []
        for i in range(len(data)):
            item = data[i]
            if source is not None:
                item['data_samples'].set_metainfo(dict(source=source))
            shapes = _shapes(item)
            if group and (len(group) == batch_size or shapes != _shapes(group[0][0])):
                yield _collated(model, group)
                group = []
            group.append((item, entries[i]))
        yield _collated(model, group)

    return batches(), usage, single


def _shapes(item: Mapping) -> dict:
    return {key: tuple(value.shape) for key, value in item['inputs'].items()}


def _collated(model: nn.Module, group: list) -> tuple[dict, list[Sample], list]:
    items, entries = zip(*group)
    inputs = {key: [item['inputs'][key] for item in items] for key in items[0]['inputs']}
    samples = [item['data_samples'] for item in items]
    data = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), False)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    inputs = {key: value.to(parameter.dtype) if parameter is not None and value.is_floating_point() else value
              for key, value in data['inputs'].items()}
    return inputs, data['data_samples'], list(entries)


def predict(model: nn.Module, points, category=None, task: str | None = None, threshold: float | None = None,
            pipeline: Sequence | None = None, batch_size: int = 32) -> Prediction | list[Prediction]:
    """What ``model`` says about clouds, images or clips; see :meth:`ewa3d.models.task.TaskModel.predict`.

    Raises:
        TypeError, ValueError: as there.
    """
    if getattr(model, 'head', None) is None and getattr(model, 'tasks', None) is None:
        raise ValueError('predict needs a head; this model has none, extract gives its features')
    if threshold is not None:
        check_number('threshold', threshold)
    batches, usage, single = _batches(model, points, category, task, pipeline, batch_size)
    found = []
    with evaluating(model):
        for inputs, samples, entries in batches:
            samples = model(inputs, samples, mode='predict')
            clouds = inputs.get('points', [None] * len(samples))
            found += [prediction_of(sample, entry, cloud, usage, threshold)
                      for sample, entry, cloud in zip(samples, entries, clouds)]
    return found[0] if single else found


def prepare(model: nn.Module, points, category=None, task: str | None = None,
            pipeline: Sequence | None = None) -> dict[str, Tensor]:
    """The model's inputs for clouds, images or clips, on its device: a batch, also of one.

    Raises:
        ValueError: nothing, or samples that the pipeline leaves in different shapes; and what ``predict`` raises.
    """
    size = len(points) if isinstance(points, (list, tuple, np.ndarray, Tensor)) else 1
    batches, _, _ = _batches(model, points, category, task, pipeline, max(size, 1))
    found = [inputs for inputs, _, _ in batches]
    if not found:
        raise ValueError('nothing was given; a sample or a list of them was expected')
    if len(found) != 1:
        shapes = {tuple(value.shape[1:]) for inputs in found for value in inputs.values()}
        raise ValueError(f'one batch was expected, the samples have the shapes {sorted(shapes)}; give them one by one')
    return found[0]


def originals(model: nn.Module, files: Sequence[str | Path], task: str | None = None) -> tuple[list[np.ndarray], str]:
    """What is in files, as :func:`predict` reads them and as its parts and boxes are told for: clouds ``(N, 3+F)`` or
    images ``(H, W, C)``; and the axis of the clouds that points up.

    Raises:
        ValueError: videos, which are no one picture; and what ``predict`` raises.
    """
    usage, _ = _chosen(model, task, None)
    cls = _given_class(usage)
    if cls is _Clips:
        raise ValueError('pictures are drawn of clouds and images; the model takes videos')
    data = cls(_entries(list(files), cls)[0], [], {}, columns=_columns(model, usage))
    return [data.raw(i)[cls.key] for i in range(len(data))], usage.metainfo.get('up_axis') or 'z'
