"""What every data set of point clouds shares: metainfo, the pipeline, seeding."""
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from ewa3d.checks import check_integer, check_number, is_integer, some
from ewa3d.datasets.io import as_cloud, read_cloud
from ewa3d.registry import DATASETS, TRANSFORMS, nearest

__all__ = ['PointDataset', 'require_folder', 'shared_ids']

logger = logging.getLogger('ewa3d')
AXES = ('x', 'y', 'z')
KEPT_ERRORS = (ValueError, TypeError, KeyError, FileNotFoundError, ImportError)
DATA_ERRORS = (ValueError, TypeError, OSError)  # what `on_error` is about; a missing package is none of the data's
READ_THREADS = 8


def require_folder(folder: str | Path, what: str) -> Path:
    """``folder`` as a path; ``FileNotFoundError`` that says where to get the data when it is not there."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f'{what}: there is no folder {str(folder)!r} (looked for it in {str(Path.cwd())!r}); '
                                f'`ewa3d data prepare` gets published data, data/README.md shows how they are laid out')
    return folder


@DATASETS.register_module()
class PointDataset(Dataset):
    """Point clouds with labels, behind a pipeline of transforms.

    A new data set is a subclass with ``METAINFO`` and :meth:`load_data_list`::

        @DATASETS.register_module()
        class Fruit(PointDataset):
            METAINFO = dict(classes=('apple', 'pear'), up_axis='z')

            def load_data_list(self):
                return [dict(path=self.data_root / 'a1.npy', label=0), dict(path=self.data_root / 'p7.npy', label=1)]

    Each sample starts as ``dict(points (N, 3+F) float32, label, name, index, up_axis, normals, rng)`` (and whatever
    else its entry holds, for example ``parts``) and goes through ``pipeline``. Its ``rng`` depends on
    ``(seed, epoch, index)`` alone: the augmentation does not change with the number of workers.

    Args:
        label_seed: of the draw of ``label_fraction``.
        data_root: folder of the data.
        split: which part; a subclass says which ones it has in ``SPLITS``.
        pipeline: transforms, as config dicts or callables ``results -> results``.
        metainfo: replaces entries of ``METAINFO``.
        indices: a subset: a list of indices, or a number of samples spread evenly over the list.
        label_fraction: keep this share of every class, of at least one sample each, drawn with ``label_seed``: what
            fine-tuning with few labels trains on. Under one seed a smaller share is a part of a larger one.
        seed: of the augmentation; ``None`` takes the run's seed in training, and 0 outside of a run.
        cache_dir: where data sets that prepare their clouds keep the result; ``None`` keeps it in memory.
        lazy_init: leave the reading of the list to the first use. ``metainfo`` is there in any case.
        on_error: what a sample that cannot be read is: ``'raise'`` an error when it is needed; ``'skip'`` reads every
            sample once, when the data set is first used, leaves out those that fail and logs how many and which.
        max_skipped: with ``'skip'``, the largest share of samples that may be left out; more is an error.

    Attributes:
        skipped: the names of the samples that were left out.

    Raises:
        ValueError, TypeError, KeyError, FileNotFoundError: naming the sample, file or key and what was expected.
    """

    METAINFO: ClassVar[dict] = {}
    SPLITS: tuple | None = None
    NAMED = True  # whether a sample's name says which one it is, in all splits; made-up samples have none
    UNREADABLE = 'samples cannot be read'

    def __init__(self, data_root: str | Path | None = None, split: str | None = 'train', pipeline: Iterable = (),
                 metainfo: dict | None = None, indices: int | Sequence[int] | None = None, seed: int | None = None,
                 cache_dir: str | Path | None = 'data/.cache', lazy_init: bool = False,
                 label_fraction: float | None = None, label_seed: int = 0, on_error: str = 'raise',
                 max_skipped: float = 0.5):
        if self.SPLITS is not None and split not in self.SPLITS:
            raise ValueError(f'{type(self).__name__} has no split {split!r}; {nearest(split, self.SPLITS)}')
        self.data_root = None if data_root is None else Path(data_root).expanduser()
        self.split = split
        self.seed = None if seed is None else check_integer(f'{type(self).__name__}: seed', seed, 0)
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.pipeline = [build_transform(step) for step in pipeline]
        self._indices = indices
        if label_fraction is not None:
            check_number(f'{type(self).__name__}: label_fraction', label_fraction, '(0, 1]')
        self.label_fraction = label_fraction
        self.label_seed = check_integer(f'{type(self).__name__}: label_seed', label_seed, 0)
        if on_error not in ('raise', 'skip'):
            raise ValueError(f"{type(self).__name__}: on_error must be 'raise' or 'skip', got {on_error!r}")
        self.on_error = on_error
        self.max_skipped = check_number(f'{type(self).__name__}: max_skipped', max_skipped)
        self.skipped: list[str] = []
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._data_list: list[dict] | None = None
        self._metainfo = merge_metainfo(self.METAINFO, self.load_metainfo(), metainfo or {})
        if not lazy_init:
            self.full_init()

    # ---- what a subclass writes -------------------------------------------------------------------------------------
    def load_metainfo(self) -> dict:
        """Metainfo that only the data can tell (class names from a file, say). Must be cheap."""
        return {}

    def load_data_list(self) -> list[dict]:
        """One dict a sample: ``points`` (an array) or ``path`` (a file), ``label``, optionally ``name``, ``parts``."""
        raise NotImplementedError(f'{type(self).__name__} must define load_data_list()')

    def load_cloud(self, entry: dict) -> dict:
        """What an entry of the data list stands for: ``points`` ``(N, 3+F)``, and ``parts`` ``(N,)``."""
        if 'points' in entry:
            return {}
        if 'path' in entry:
            return dict(points=self._read_path(entry['path']))
        raise KeyError(f"an entry of the data list needs 'points' or 'path', got {sorted(entry)}")

    # ---- what everybody uses ----------------------------------------------------------------------------------------
    @property
    def metainfo(self) -> dict:
        """``classes``, ``up_axis`` and what else the data set says about itself (a copy)."""
        return dict(self._metainfo)

    @property
    def labels(self) -> list[int | None]:
        """The label of every sample."""
        self.full_init()
        return [self._data_list[i].get('label') for i in self._chosen]

    @property
    def ids(self) -> list[tuple[str, str]]:
        """Which samples these are: folder of the data and name, of those that have a name or a path."""
        self.full_init()
        entries = (self._data_list[i] for i in self._chosen) if self.NAMED else ()
        root = str(self.data_root.resolve()) if self.data_root is not None else ''
        return [(root, str(name)) for entry in entries if (name := entry.get('name') or entry.get('path'))]

    @property
    def epoch(self) -> int:
        """Whose augmentation samples have."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of this epoch; workers that are already running see it, too."""
        self._epoch.fill_(check_integer('the epoch', epoch, 0))

    def full_init(self) -> None:
        """Read the list of samples, once."""
        if self._data_list is not None:
            return
        try:
            data_list = self.load_data_list()
        except TypeError as error:
            if self.data_root is None and 'NoneType' in str(error):  # self.data_root / 'name'
                raise TypeError(f'{type(self).__name__}: load_data_list() failed ({error}); if it needs the folder of '
                                f'the data, give it as data_root=…, which is None') from error
            raise
        if data_list is None:
            raise TypeError(f'{type(self).__name__}: load_data_list() must return a list of dicts, got None')
        data_list = list(data_list)
        if not data_list:
            raise ValueError(f'{self._what} has no samples')
        check_labels(data_list, self._metainfo.get('classes'), self._what)
        chosen = choose(len(data_list), self._indices, self._what)
        if self.on_error == 'skip':
            chosen = self._readable(data_list, chosen)
        if self.label_fraction is not None:
            labels = [data_list[i].get('label') for i in chosen]
            kept = share_of_labels(labels, self.label_fraction, self.label_seed, self._what)
            chosen = [chosen[i] for i in kept]
        self._chosen, self._data_list = chosen, data_list

    def __len__(self) -> int:
        self.full_init()
        return len(self._chosen)

    def __getitem__(self, i: int | tuple[int, int]) -> dict:
        return self.sample(*i) if isinstance(i, tuple) else self.sample(i)

    def sample(self, i: int, repeat: int = 0) -> dict:
        """Sample ``i``; where an epoch has it more than once, ``repeat`` tells the times apart and each is augmented
        anew."""
        self.full_init()
        index = self._chosen[operator.index(i)]
        try:
            results = self._start(index)
        except KEPT_ERRORS as error:
            raise self._located(error, index) from error
        if repeat:
            results['rng'] = np.random.default_rng((self.seed or 0, self.epoch, index, repeat))
        for step in self.pipeline:
            try:
                results = step(results)
            except Exception as error:
                raise self._located(error, index, step) from error
            if results is None:
                raise ValueError(f'{self._name(index)}: {type(step).__name__} returned None instead of the sample')
        return results

    def name_of(self, i: int | tuple[int, int]) -> str:
        """What sample ``i`` is called, without reading it."""
        self.full_init()
        return self._name(self._chosen[operator.index(i[0] if isinstance(i, tuple) else i)])

    def raw(self, i: int) -> dict:
        """Sample ``i`` as the pipeline is given it."""
        self.full_init()
        return self._start(self._chosen[operator.index(i)])

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._epoch = self._epoch.share_memory_()  # a deep copy loses it

    def __repr__(self) -> str:
        size = 'not read yet' if self._data_list is None else f'{len(self)} samples'
        return f'{type(self).__name__}(split={self.split!r}, data_root={str(self.data_root)!r}, {size})'

    # ---- inside -----------------------------------------------------------------------------------------------------
    def _read_each(self, read: Callable, sources: Iterable[tuple], columns: int) -> Iterator[np.ndarray]:
        """``read(*source)`` of each, for a cache; with ``on_error='skip'`` a cloud without points where that fails.

        A ``map``, which goes on after an error where a generator would have ended: ``data check`` tells all of them.
        """
        def one(source: tuple) -> np.ndarray:
            try:
                return read(*source)
            except DATA_ERRORS as error:
                if self.on_error == 'raise':
                    raise
                logger.warning('%s', error)
                return np.empty((0, columns), np.float32)
        return map(one, sources)

    def _cache_settings(self, **settings) -> dict:
        """``settings`` of a cache, which may have clouds without points."""
        return settings if self.on_error == 'raise' else dict(settings, on_error=self.on_error)

    @property
    def _what(self) -> str:
        where = f' in {str(self.data_root)!r}' if self.data_root is not None else ''
        return f'{type(self).__name__}, split {self.split!r}{where}'

    def _name(self, index: int) -> str:
        entry = self._data_list[index]
        return str(entry.get('name') or entry.get('path') or f'{type(self).__name__}[{index}]')

    def _readable(self, data_list: list[dict], chosen: Sequence[int]) -> list[int]:
        """Those of ``chosen`` that can be read; the others are reported."""
        self._data_list = data_list  # what reading a sample looks at
        try:
            with ThreadPoolExecutor(READ_THREADS) as pool:
                failures = list(pool.map(self._failure, chosen))
            bad = [(i, text) for i, text in zip(chosen, failures) if text]
            self.skipped = [str(data_list[i].get('path') or self._name(i)) for i, _ in bad]
        finally:
            self._data_list = None
        if bad:
            text = (f'{self._what}: {len(bad)} of {len(chosen)} {self.UNREADABLE}', some(self.skipped), bad[0][1])
            if len(bad) > self.max_skipped * len(chosen) or len(bad) == len(chosen):
                raise ValueError(f'{text[0]}, more than max_skipped={self.max_skipped} of them: {text[1]}; the first: '
                                 f'{text[2]}')
            logger.warning('%s and are skipped: %s; the first: %s', *text)
        return [i for i, failure in zip(chosen, failures) if not failure]

    def _failure(self, index: int) -> str:
        """Why a sample cannot be read; nothing where it can."""
        try:
            self._start(index)
        except DATA_ERRORS as error:
            return error_text(self._located(error, index))
        return ''

    def _start(self, index: int) -> dict:
        """What the pipeline is given; errors of it are told apart by the sample's name."""
        entry, name = self._data_list[index], self._name(index)
        results = {**self._defaults(index), **entry, **self.load_cloud(entry)}
        if 'row' in entry and not len(results['points']):
            raise ValueError(f'{name}: could not be read when the cache was written')
        points = as_cloud(results['points'], name).view()
        if not isinstance(results['normals'], (bool, np.bool_)):
            raise TypeError(f"{name}: 'normals' says whether columns 3 to 5 of 'points' are normals (True or "
                            f"False), got {type(results['normals']).__name__}; put the vectors into these columns")
        if results['normals'] and points.shape[1] < 6:
            raise ValueError(f'{name}: normals need 6 columns, the cloud has {points.shape[1]}')
        if results.get('parts') is not None and len(results['parts']) != len(points):
            raise ValueError(f'{name}: {len(results["parts"])} part labels for {len(points)} points')
        points.flags.writeable = False  # a transform that writes in place would change the data for good
        results.update(points=points, name=name)
        return results

    def _defaults(self, index: int) -> dict:
        """What a sample has unless its entry says otherwise."""
        return dict(index=index, up_axis=self._metainfo.get('up_axis'), normals=bool(self._metainfo.get('normals')),
                    rng=np.random.default_rng((self.seed or 0, self.epoch, index)))

    def _read_path(self, path: str | Path) -> np.ndarray:
        """The cloud in a file; normals that the file (a mesh, say) has are kept only where they are asked for."""
        points, normals = read_cloud(path)
        wanted = bool(self._metainfo.get('normals'))
        if wanted and normals is False:
            raise ValueError(f"{path}: metainfo says normals=True, but the file has none")
        return np.delete(points, slice(3, 6), axis=1) if normals and not wanted else points

    def _located(self, error: Exception, index: int, step: Callable | None = None) -> Exception:
        """``error`` as one that names the sample and the transform."""
        name, text = self._name(index), error_text(error)
        where = f'{type(step).__name__}: ' if step is not None else ''
        if name not in text:
            where = f'{name}: {where}'
        kind = type(error) if type(error) in KEPT_ERRORS else RuntimeError
        kept = text if kind is type(error) else f'{type(error).__name__}: {text}'
        return kind(f'{where}{kept}')


def shared_ids(one: Iterable, other: Iterable) -> list[str]:
    """The names of the samples that two lists of data sets have in common, sorted."""
    first, second = ({i for data in part for i in getattr(data, 'ids', ())} for part in (one, other))
    return sorted(name for _, name in first & second)


def error_text(error: Exception) -> str:
    """The message of an error (``str`` of a ``KeyError`` would put quotes around it)."""
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error) or repr(error)


def build_transform(step) -> Callable:
    """A transform from its config dict; a callable stays what it is."""
    transform = TRANSFORMS.build(step) if isinstance(step, dict) else step
    if not callable(transform):
        raise TypeError(f'a transform is a config dict or a callable, got {step!r}')
    return transform


def merge_metainfo(*parts: dict) -> dict:
    """The parts over one another, with ``classes`` as a tuple of distinct names and ``up_axis`` checked."""
    merged: dict = {}
    for part in parts:
        merged.update(part)
    if 'classes' in merged:
        classes = merged['classes']
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"metainfo 'classes' must be a sequence of names, got {classes!r}")
        if len(set(classes)) != len(classes):
            raise ValueError(f"metainfo 'classes' names a class twice: {sorted(classes)}")
        merged['classes'] = tuple(classes)
    if merged.get('up_axis') not in (None, *AXES):
        raise ValueError(f"metainfo 'up_axis' must be 'x', 'y' or 'z', got {merged['up_axis']!r}")
    return merged


def check_labels(data_list: list[dict], classes: Sequence[str] | None, what: str) -> None:
    """Raise unless every label is an integer that has a class."""
    for i, entry in enumerate(data_list):
        if not isinstance(entry, dict):
            raise TypeError(f"{what}: sample {i}: an entry of the data list is a dict with 'points' or 'path' and "
                            f"'label', got {type(entry).__name__}")
        label = entry.get('label')
        if label is None:
            continue
        name = entry.get('name') or entry.get('path') or i
        if not is_integer(label):
            raise TypeError(f'{what}: sample {name}: the label must be an integer (the index of its class), '
                            f'got {label!r}')
        if label < 0 or (classes is not None and label >= len(classes)):
            raise ValueError(f'{what}: sample {name}: label {label} is not one of the '
                             f'{len(classes) if classes is not None else ""} classes (counted from 0)')


def choose(total: int, indices: int | Sequence[int] | None, what: str) -> Sequence[int]:
    """The indices of a subset of ``total`` samples (see :class:`PointDataset`)."""
    if indices is None:
        return range(total)
    if isinstance(indices, bool) or (not is_integer(indices) and any(isinstance(i, (bool, np.bool_)) for i in indices)):
        raise TypeError(f'{what}: indices are integers, got booleans; np.flatnonzero(mask) turns a mask into them')
    if is_integer(indices):
        if not 1 <= indices <= total:
            raise ValueError(f'{what}: indices={indices} samples asked for, there are {total}')
        return [i * total // int(indices) for i in range(int(indices))]
    chosen = [operator.index(i) for i in indices]
    wrong = [i for i in chosen if not 0 <= i < total]
    if wrong or not chosen:
        raise ValueError(f'{what}: indices must name some of the samples 0 … {total - 1}, got {wrong or chosen}')
    return chosen


def share_of_labels(labels: Sequence[int | None], fraction: float, seed: int, what: str) -> list[int]:
    """Which samples keep their label, in order: of every class ``fraction``, rounded, of at least one sample.

    The order in which a class is drawn depends on ``seed`` and the class alone, so a smaller share is a part of a
    larger one.
    """
    if any(label is None for label in labels):
        raise ValueError(f'{what}: label_fraction={fraction} needs labels, sample {list(labels).index(None)} has none')
    labels = np.asarray(labels)
    kept = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        size = max(1, round(fraction * len(members)))
        kept += np.random.default_rng((seed, int(label))).permutation(members)[:size].tolist()
    return sorted(kept)
