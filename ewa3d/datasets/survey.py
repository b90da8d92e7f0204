"""What is there of a data set, and what is wrong with it."""
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ewa3d import registry as R
from ewa3d.checks import some
from ewa3d.datasets.base import KEPT_ERRORS, error_text
from ewa3d.datasets.cache import ReadNoFurther, without_cache
from ewa3d.progress import track
from ewa3d.registry import nearest

__all__ = ['SIZES', 'Survey', 'config_line', 'survey']

# What the owners hand out: class, variant and split → samples. data/README.md says where these are from.
SIZES = {('ModelNet', 10): dict(train=3991, test=908), ('ModelNet', 40): dict(train=9843, test=2468),
         ('ShapeNet55', None): dict(train=41952, test=10518),
         ('ShapeNetPart', None): dict(train=12137, val=1870, test=2874, trainval=14007),
         ('ScanObjectNN', 'hardest'): dict(train=11416, test=2882),
         ('SUNRGBDDetection', None): dict(train=5285, val=5050),
         ('CIFAR10', None): dict(train=50000, test=10000), ('CIFAR100', None): dict(train=50000, test=10000)}
NAMED = 5  # problems of one kind that are told in full


@dataclass
class Survey:
    """What :func:`survey` found; ``str()`` is what ``ewa3d data check`` prints.

    Attributes:
        line: the data set's config, as it would be written.
        samples: how many there are; expected: how many its owners hand out, where that is known.
        labels: by class, how many samples; empty where they have none. boxes: the same of the boxes of scenes.
        points: of the clouds, the smallest, median and largest number; ``None`` where they are none.
        cache: the folder of the prepared clouds, where there is one.
        problems: what is wrong; notes: what may be meant.
    """
    line: str
    samples: int = 0
    expected: int | None = None
    labels: dict[str, int] = field(default_factory=dict)
    boxes: dict[str, int] = field(default_factory=dict)
    points: tuple[int, int, int] | None = None
    cache: Path | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [self.line]
        if self.samples:
            told = '' if self.expected is None else f' (the whole has {self.expected})'
            lines.append(f'  samples: {self.samples}{told}')
        if self.points is not None:
            low, median, high = self.points
            lines.append(f'  points a cloud: {low}' if low == high else f'  points a cloud: {low} to {high}, median '
                                                                        f'{median}')
        if self.boxes:
            lines.append(f'  boxes: {sum(self.boxes.values())}')
        for counts in filter(None, (self.labels, self.boxes)):
            width, most = max(map(len, counts)), max(max(counts.values()), 1)
            lines += [f'  {name:<{width}} {count:>7} {"█" * round(30 * count / most)}'.rstrip()
                      for name, count in counts.items()]
        if self.cache is not None:
            lines.append(f'  cache: {self.cache}')
        lines += [f'  note: {note}' for note in self.notes] + [f'  wrong: {problem}' for problem in self.problems]
        return '\n'.join(lines if self.problems else [*lines, '  nothing is wrong'])


def survey(cfg: Mapping, cache: bool = True) -> Survey:
    """Read every sample of the data set of ``cfg`` once, without its pipeline.

    What is missing, of another format or not finite is listed, not raised; data sets that keep a cache stop at the
    first file that is wrong, and write the cache where nothing is.

    Args:
        cache: ``False`` reads the files themselves, and neither orders the clouds nor keeps them: quicker, and where
            every cloud has a file, all that are wrong are listed.

    Raises:
        KeyError, TypeError: a config that is none.
    """
    found = Survey(config_line(cfg))
    cls = R.DATASETS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
    try:
        with nullcontext() if cache else without_cache():
            data = R.DATASETS.build(dict(cfg))
        found.samples = len(data)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        found.problems.append(error_text(error))
        return found
    found.expected = (SIZES.get((cls.__name__, cfg.get('variant', getattr(data, 'variant', None)))) or {}).get(
        getattr(data, 'split', None))
    if cfg.get('indices') is None and cfg.get('label_fraction') is None and found.expected not in (None, found.samples):
        kind = found.notes if found.samples < found.expected else found.problems
        kind.append(f'{found.samples} samples, the whole has {found.expected}')
    found.cache = getattr(getattr(data, '_clouds', None), 'folder', None)
    _count_labels(data, found)
    if hasattr(data, 'raw'):
        _read_all(data, cfg, found)
    return found


def config_line(cfg: Mapping) -> str:
    """``dict(type='ModelNet', variant=10, split='train')``."""
    shown = (f'{key}={value!r}' for key, value in cfg.items() if key != 'pipeline')
    return f'dict({", ".join(shown)})'


def _count_labels(data, found: Survey) -> None:
    labels = getattr(data, 'labels', None)
    classes = list((getattr(data, 'metainfo', None) or {}).get('classes') or [])
    if labels is None or all(label is None for label in labels):
        return
    counts = Counter(labels)
    if counts.pop(None, 0):
        found.problems.append(f'{labels.count(None)} samples have no label')
    names = classes or [str(i) for i in range(1 + max(counts))]
    found.labels = {str(name): counts[i] for i, name in enumerate(names)}
    empty = [name for name, count in found.labels.items() if not count]
    if empty:
        found.notes.append(f'no samples of {some(empty)}')


def _read_all(data, cfg: Mapping, found: Survey) -> None:
    sizes, failures, flat, columns, boxes = [], [], [], Counter(), Counter()
    for i in track(range(found.samples), f'reading {type(data).__name__}'):
        try:
            sample = data.raw(i)
        except ReadNoFurther as error:
            failures.append(error_text(error))
            break
        except KEPT_ERRORS as error:
            failures.append(error_text(error))
            continue
        boxes.update(np.asarray(sample.get('box_labels', ())).tolist())
        points = sample.get('points')
        if points is not None:
            sizes.append(len(points))
            columns[points.shape[1]] += 1
            if not np.ptp(points[:, :3], axis=0).any():
                flat.append(str(sample['name']))
    if boxes:
        found.boxes = {str(name): boxes[i] for i, name in enumerate(data.metainfo['classes'])}
    found.problems += failures[:NAMED]
    if len(failures) > NAMED:
        found.problems.append(f'and {len(failures) - NAMED} more samples that cannot be read')
    if flat:
        found.problems.append(f'{len(flat)} clouds whose points are all in one place: {some(flat, 3)}')
    if len(columns) > 1:
        found.problems.append('clouds have different columns: ' + ', '.join(
            f'{count} of {width}' for width, count in sorted(columns.items())))
    if sizes:
        found.points = min(sizes), int(np.median(sizes)), max(sizes)
        _compare_sizes(np.array(sizes), cfg, found)


def _compare_sizes(sizes: np.ndarray, cfg: Mapping, found: Survey) -> None:
    """Clouds with fewer points than the pipeline draws from them."""
    for step in cfg.get('pipeline') or ():
        if isinstance(step, Mapping) and step.get('type') == 'Resample' and not step.get('replace'):
            few = int((sizes < step['num_points']).sum())
            if few and step.get('pad') is None:
                found.problems.append(f'{few} clouds have fewer than the {step["num_points"]} points that Resample '
                                      "asks for; pad='repeat' repeats some")
            elif few:
                found.notes.append(f'{few} clouds have fewer than {step["num_points"]} points; some are repeated')


def data_config(cfg: Mapping, split: str) -> Mapping:
    """The config of the data set of a split of a whole config, below its wrappers.

    Raises:
        KeyError: the config has none.
    """
    from ewa3d.engine.derive import dataset_cfgs
    found = dataset_cfgs(cfg.get(f'{split}_dataloader'))
    if not found:
        have = [name.removesuffix('_dataloader') for name in cfg if name.endswith('_dataloader') and cfg.get(name)]
        raise KeyError(f'the config has no {split}_dataloader; {nearest(split, have)}')
    return found[0]
