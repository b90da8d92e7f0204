"""Few-shot classification: the published folds of ModelNet40, or folds drawn from any labelled data set."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ewa3d.checks import check_integer
from ewa3d.datasets.base import PointDataset, require_folder
from ewa3d.datasets.cache import cached_clouds
from ewa3d.datasets.io import as_cloud
from ewa3d.datasets.pickles import read_numpy_pickle
from ewa3d.registry import DATASETS

__all__ = ['FewShot', 'draw_fold', 'make_fold', 'read_fold']

DEFAULT_ROOT = 'data/ModelNetFewshot'
SPLITS = ('train', 'test')


@DATASETS.register_module()
class FewShot(PointDataset):
    """A fold: ``way`` classes with ``shot`` clouds of each to train on, and ``queries`` of each to test on.

    Labels count from 0 to ``way`` − 1; a sample's ``class_id`` is the label that its source has. The classes are called
    ``class_0`` … as every fold has others.

    Without ``base``, the folds of ModelNet40 that Point-BERT and Point-MAE report on are read, from
    ``{way}way_{shot}shot/{fold}.pkl`` or ``{way}way{shot}shot/{fold}.pkl``; y is up. They are pickles: only arrays are
    read from them and nothing in them is executed. The first use of a fold orders its clouds by farthest point sampling
    and keeps the result under ``cache_dir``.

    Args:
        data_root: the folder of these folders; by default ``data/ModelNetFewshot``.
        split: ``'train'`` or ``'test'``.
        base: config of a data set with the splits ``train`` and ``test`` to draw folds from; no files are needed then.
        way, shot, fold: which fold.
        queries: test clouds of each class (20 in the published folds); belongs to ``base``.
        fold_seed: of the drawing; ``seed`` is the augmentation's. Belongs to ``base``. Folds of one seed have the same
            classes and queries for every ``shot`` that all classes have clouds for, and the clouds of a smaller one are
            among those of a larger.
        normals: keep normals as columns 3 to 5. With ``base``, that decides.
        max_points: how many points of a cloud of the published folds are kept at most.

    Raises:
        FileNotFoundError, ValueError, TypeError: no such fold, other content, too few samples for it.
    """

    SPLITS = SPLITS

    def __init__(self, data_root: str | Path | None = None, split: str = 'train', base: dict | None = None,
                 way: int = 5, shot: int = 10, fold: int = 0, queries: int = 20, fold_seed: int = 0,
                 normals: bool = False, max_points: int = 2048, **kwargs):
        for name, value, least in (('way', way, 2), ('shot', shot, 1), ('fold', fold, 0), ('queries', queries, 1),
                                   ('fold_seed', fold_seed, 0), ('max_points', max_points, 1)):
            check_integer(f'FewShot: {name}', value, least)
        self.way, self.shot, self.fold = way, shot, fold
        self.queries, self.fold_seed = queries, fold_seed
        self.base, self.normals, self.max_points = check_base(base, data_root, normals), bool(normals), max_points
        root = None
        if base is None:
            root = require_folder(data_root or DEFAULT_ROOT, 'FewShot')
            self.file = find_fold(root, way, shot, fold)
        super().__init__(root, split, **kwargs)

    def load_metainfo(self) -> dict:
        inherited = self._build('train').metainfo if self.base else dict(up_axis='y', normals=self.normals)
        inherited = {key: inherited[key] for key in ('up_axis', 'normals') if key in inherited}
        return dict(inherited, classes=tuple(f'class_{i}' for i in range(self.way)))

    def load_data_list(self) -> list[dict]:
        return self._drawn() if self.base else self._published()

    def load_cloud(self, entry: dict) -> dict:
        return {} if self.base else dict(points=self._clouds[entry['row']], max_points=self.max_points)

    # ---- inside -----------------------------------------------------------------------------------------------------
    def _build(self, split: str) -> PointDataset:
        dataset = DATASETS.build({'cache_dir': self.cache_dir, **self.base, 'split': split, 'lazy_init': True})
        if not isinstance(dataset, PointDataset):
            raise TypeError(f'FewShot: base must be a PointDataset, got {type(dataset).__name__}')
        return dataset

    def _drawn(self) -> list[dict]:
        bases = {split: self._build(split) for split in SPLITS}
        fold = draw_fold({split: base.labels for split, base in bases.items()}, self.way, self.shot, self.fold,
                         self.queries, self.fold_seed)
        entries = []
        for index, label, class_id in fold[self.split]:
            sample = bases[self.split][index]
            del sample['rng'], sample['index']  # those of this data set count
            entries.append({**sample, 'label': label, 'class_id': class_id})
        return entries

    def _published(self) -> list[dict]:
        file = self.file
        items = read_fold(file, self.way)[self.split]
        if not items:
            raise ValueError(f'{file}: holds no {self.split} clouds')
        wanted = 6 if self.normals else 3

        def read():
            for i, (points, _, _) in enumerate(items):
                points = as_cloud(points, f'{file}[{self.split}][{i}]')
                if points.shape[1] < wanted:
                    raise ValueError(f'{file}: normals=True needs rows of 6 numbers, it has {points.shape[1]}')
                yield points[:, :wanted]

        name = f'fewshot_{self.way}way_{self.shot}shot_{self.fold}_{self.split}'
        self._clouds = cached_clouds(self.cache_dir, name, dict(normals=self.normals), [file], self.data_root, read,
                                     len(items), self.max_points)
        return [dict(name=f'{file.parent.name}/{file.name}[{self.split}][{row}]', label=label, class_id=class_id,
                     row=row, fps_ordered=True) for row, (_, label, class_id) in enumerate(items)]


def find_fold(root: Path, way: int, shot: int, fold: int) -> Path:
    """The file of a published fold, by either of the names that its folder may have."""
    files = [root / name / f'{fold}.pkl' for name in (f'{way}way_{shot}shot', f'{way}way{shot}shot')]
    for file in files:
        if file.is_file():
            return file
    raise FileNotFoundError(f'FewShot: there is neither {files[0]} nor {files[1].relative_to(root)}; data/README.md '
                            f"says where to get them, and base=dict(type='ModelNet') draws folds without them")


def check_base(base, data_root, normals: bool) -> dict | None:
    """``base``, or an error where it holds, or stands beside, what belongs elsewhere."""
    if base is None:
        return None
    if not isinstance(base, Mapping) or 'type' not in base:
        raise TypeError(f"FewShot: base must be the config of a data set, dict(type='ModelNet', …), got {base!r}")
    if data_root is not None or normals:
        raise ValueError('FewShot: with base, data_root and normals belong into it')
    for key in ('split', 'pipeline', 'lazy_init'):
        if key in base:
            raise ValueError(f'FewShot: base takes no {key!r}: {key} is given to FewShot itself')
    return dict(base)


def draw_fold(labels: Mapping[str, Sequence[int]], way: int, shot: int, fold: int = 0, queries: int = 20,
              seed: int = 0) -> dict[str, list[tuple[int, int, int]]]:
    """Which samples a fold is made of.

    Args:
        labels: the label of every sample, of ``train`` and of ``test``.

    Returns:
        for ``train`` and ``test`` a list of ``(index of the sample, label in the fold, label in the source)``: ``shot``
        samples of each of ``way`` classes, and ``queries`` of each. It depends on the arguments alone, on every machine
        and with every version of numpy.

    Raises:
        ValueError: fewer than ``way`` classes have as many samples.
    """
    needed = dict(train=shot, test=queries)
    if any(label is None for split in needed for label in labels[split]):
        raise ValueError('FewShot: a sample of the data set that folds are drawn from has no label')
    labels = {split: np.asarray(labels[split]) for split in needed}
    counts = {split: dict(zip(*np.unique(labels[split], return_counts=True))) for split in needed}
    able = sorted(c for c in counts['train'] if all(counts[split].get(c, 0) >= needed[split] for split in needed))
    if len(able) < way:
        raise ValueError(f'FewShot: way={way} classes with shot={shot} training and queries={queries} test samples '
                         f'asked for, {len(able)} of {len(counts["train"])} classes have so many')
    classes = frozen_rng(seed, way, fold).permutation(able)[:way]
    drawn: dict = {split: [] for split in needed}
    for label, class_id in enumerate(classes.tolist()):
        for i, (split, size) in enumerate(needed.items()):
            members = np.flatnonzero(labels[split] == class_id)
            rng = frozen_rng(seed, way, fold, class_id, i)  # not of the shot: folds of 10 and 20 nest
            drawn[split] += [(index, label, class_id) for index in rng.permutation(members)[:size].tolist()]
    return drawn


def frozen_rng(*seed: int) -> np.random.RandomState:
    """A generator whose methods numpy keeps as they are; those of ``default_rng`` may change with its version."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed)))


def make_fold(train: PointDataset, test: PointDataset, way: int, shot: int, fold: int = 0, queries: int = 20,
              seed: int = 0) -> dict[str, list[tuple[np.ndarray, int, int]]]:
    """A fold as the published pickles hold it: for ``train`` and ``test`` a list of ``(points (N, 3+F), label in the
    fold, label in the source)``. The data sets are without a pipeline."""
    datasets = dict(train=train, test=test)
    fold = draw_fold({split: dataset.labels for split, dataset in datasets.items()}, way, shot, fold, queries, seed)
    return {split: [(np.array(datasets[split][index]['points']), label, class_id) for index, label, class_id in rows]
            for split, rows in fold.items()}


def read_fold(file: str | Path, way: int) -> dict[str, list[tuple[np.ndarray, int, int]]]:
    """A published fold (see :func:`make_fold`), read without executing anything in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no pickle of plain arrays, or one of another content.
    """
    content = read_numpy_pickle(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(split), (list, tuple)) for split in SPLITS):
        raise ValueError(f"{file}: should hold dict(train=[(points, label, class), …], test=[…])")
    return {split: [_item(item, f'{file}[{split}][{i}]', way) for i, item in enumerate(content[split])]
            for split in SPLITS}


def _item(item, name: str, way: int) -> tuple[np.ndarray, int, int]:
    if not isinstance(item, (list, tuple)) or len(item) != 3 or not isinstance(item[0], np.ndarray):
        raise ValueError(f'{name}: should hold (points, label, class), got {str(item)[:80]}')
    points, label, class_id = item
    number = np.asarray(label)
    if number.dtype.kind not in 'iu' or number.size != 1:
        raise ValueError(f'{name}: the label should be an integer, got {str(label)[:80]}')
    if not 0 <= number.item() < way:
        raise ValueError(f'{name}: label {number.item()} is not one of the {way} classes (0 … {way - 1})')
    return points, number.item(), class_id
