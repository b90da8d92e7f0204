"""ShapeNetPart, and any other part segmentation data in one of its layouts."""
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ewa3d.checks import check_integer
from ewa3d.datasets.base import PointDataset, require_folder
from ewa3d.datasets.cache import cached_clouds
from ewa3d.datasets.h5 import read_data, read_labels
from ewa3d.datasets.io import as_cloud
from ewa3d.datasets.modelnet import find_h5, read_lines
from ewa3d.datasets.text import read_rows
from ewa3d.registry import DATASETS, nearest

__all__ = ['SHAPENET_PARTS', 'ShapeNetPart']

DEFAULT_ROOT = 'data/shapenetcore_partanno_segmentation_benchmark_v0_normal'
# WordNet's numbers of the categories, their names and how many parts they have; parts count through all of them.
SHAPENET = {'02691156': ('Airplane', 4), '02773838': ('Bag', 2), '02954340': ('Cap', 2), '02958343': ('Car', 4),
            '03001627': ('Chair', 4), '03261776': ('Earphone', 3), '03467517': ('Guitar', 3), '03624134': ('Knife', 2),
            '03636649': ('Lamp', 4), '03642806': ('Laptop', 2), '03790512': ('Motorbike', 6), '03797390': ('Mug', 2),
            '03948459': ('Pistol', 3), '04099429': ('Rocket', 3), '04225987': ('Skateboard', 3),
            '04379243': ('Table', 3)}
_FIRST = np.cumsum([0, *(count for _, count in SHAPENET.values())]).tolist()
_OFFICIAL = {synset: list(range(first, last)) for synset, first, last in zip(SHAPENET, _FIRST, _FIRST[1:])}
SHAPENET_PARTS = {name: _OFFICIAL[synset] for synset, (name, _) in SHAPENET.items()}
LAYOUTS = ('v0', 'normal', 'hdf5')
LISTS = dict(train=('train',), val=('val',), test=('test',), trainval=('train', 'val'))
ENTRY = re.compile(r'(?:.*/)?([\w-]+)/([\w-][\w.-]*)', re.ASCII)  # a shape in a split list; nothing leads elsewhere


class Shape(NamedTuple):
    """Where a shape is: its category and the files with its points and labels (one and the same, or two)."""
    name: str
    category: str
    points: Path
    labels: Path


@DATASETS.register_module()
class ShapeNetPart(PointDataset):
    """Shapes with a part for every point (Yi et al. 2016), from one of the three layouts in circulation:

    * ``v0``: ``<synset>/points/<id>.pts`` with rows ``x y z`` and ``<synset>/points_label/<id>.seg`` with a label a
      row, counted from 1 in each category;
    * ``normal``: ``<synset>/<id>.txt`` with rows ``x y z nx ny nz label``, labels counted through all categories;
    * ``hdf5``: ``{split}_hdf5_file_list.txt`` name files with ``data``, ``label`` and ``pid``, counted likewise.

    ``synsetoffset2category.txt`` (``all_object_categories.txt``) names the categories; their order is that of the
    labels. The official split lists ``train_test_split/shuffled_{train,val,test}_file_list.json`` are read beside the
    data. Any other data in one of these layouts are read by their path alone: the parts of a category that is not one
    of ShapeNetPart's are the labels in its training shapes.

    Entries have ``parts`` ``(N,)``, counted through all categories, and ``label``, the category. Metainfo: ``classes``
    and ``parts``, category → part numbers. The first use reads all files and keeps the result under ``cache_dir``.

    Args:
        data_root: by default ``data/shapenetcore_partanno_segmentation_benchmark_v0_normal``.
        split: ``'train'``, ``'val'``, ``'test'`` or ``'trainval'``, on which published results are trained.
        layout: one of the above; ``'auto'`` looks which one it is.
        categories: these alone, in this order.
        parts: category → its labels in the files, in ascending order, where the training shapes should not be asked.
        normals: keep normals as columns 3 to 5; of the layout ``normal`` only.
        list_dir: the folder of the split lists.

    Raises:
        FileNotFoundError: a folder, a list, or shapes that it names (how many, and the first), are not there.
        ValueError, KeyError: naming the file: an unknown synset, a category without shapes in the split, a label
            outside of its category's parts, other than one label a point, a file that cannot be read.
    """

    SPLITS = tuple(LISTS)

    def __init__(self, data_root: str | Path | None = None, split: str = 'train', layout: str = 'auto',
                 categories: Sequence[str] | None = None, parts: Mapping[str, Sequence[int]] | None = None,
                 normals: bool = False, list_dir: str | Path | None = None, **kwargs):
        if layout not in ('auto', *LAYOUTS):
            raise ValueError(f'ShapeNetPart: there is no layout {layout!r}; {nearest(layout, ("auto", *LAYOUTS))}')
        root = require_folder(data_root or DEFAULT_ROOT, 'ShapeNetPart')
        self.normals, self._wanted, self._given = bool(normals), categories, dict(parts or {})
        self.list_dir = None if list_dir is None else require_folder(list_dir, 'ShapeNetPart: list_dir')
        self.table = table_of(root)
        self._all = read_table(self.table)
        self.layout = detect_layout(root, self._all) if layout == 'auto' else layout
        if self.normals and self.layout != 'normal':
            raise ValueError(f'{root}: normals=True, and the layout {self.layout!r} has none')
        super().__init__(root, split, **kwargs)

    # ---- categories and parts ---------------------------------------------------------------------------------------
    def load_metainfo(self) -> dict:
        wanted = list(self._all if self._wanted is None else self._wanted)
        if isinstance(self._wanted, str) or not wanted:
            raise ValueError(f'ShapeNetPart: categories must be a list of names, got {self._wanted!r}')
        for name in [*wanted, *self._given]:
            if name not in self._all:
                raise KeyError(f'{self.table}: names no category {name!r}; {nearest(name, self._all)}')
        self.synsets = {name: self._all[name] for name in wanted}
        official = all(synset in SHAPENET for synset in self.synsets.values())
        self._labels = self._labels_in_files()
        parts, first = {}, 0
        for name, labels in self._labels.items():
            keep = official and not self._given
            parts[name] = tuple(_OFFICIAL[self.synsets[name]] if keep else range(first, first + len(labels)))
            first += len(labels)
        return dict(classes=wanted, parts=parts, normals=self.normals, layout=self.layout,
                    **dict(up_axis='y') if official else {})

    def _labels_in_files(self) -> dict[str, list[int]]:
        """What each part of each category is called in the files."""
        labels, unknown = {}, []
        for name, synset in self.synsets.items():
            labels[name] = None
            if name in self._given:
                given = {check_integer(f'ShapeNetPart: parts[{name!r}]', label, 0) for label in self._given[name]}
                if not given:
                    raise ValueError(f'ShapeNetPart: parts[{name!r}] must name labels, got {self._given[name]!r}')
                labels[name] = sorted(given)
            elif synset in SHAPENET:
                labels[name] = list(range(1, 1 + SHAPENET[synset][1])) if self.layout == 'v0' else _OFFICIAL[synset]
            else:
                unknown.append(name)
        if unknown:
            named = self._named_in_json() if self.layout == 'hdf5' else {}
            found = {name: named[name] for name in unknown if name in named}
            rest = [name for name in unknown if name not in found]
            labels.update(found, **self._found_in_training(rest) if rest else {})
        return labels

    def _named_in_json(self) -> dict[str, list[int]]:
        file = self.data_root / 'overallid_to_catid_partid.json'
        if not file.is_file():
            return {}
        content, found = read_json(file), {}
        try:
            pairs = content.items() if isinstance(content, dict) else enumerate(content)
            for overall, (synset, _) in pairs:
                found.setdefault(str(synset), []).append(int(overall))
        except (TypeError, ValueError) as error:
            raise ValueError(f'{file}: should hold number → [synset, part], got {str(content)[:80]}') from error
        return {name: sorted(found[synset]) for name, synset in self.synsets.items() if synset in found}

    def _found_in_training(self, names: Sequence[str]) -> dict[str, list[int]]:
        """The labels in the training shapes of categories that no table knows; they should have no gaps."""
        where: dict[str, dict[int, Path]] = {name: {} for name in names}
        for name, file, labels in self._training_labels(set(names)):
            for label in np.unique(labels).tolist():
                where[name].setdefault(label, file)
        for name, files in where.items():
            found = sorted(files)
            first = 1 if self.layout == 'v0' else found[0] if found else 0
            odd = next((label for place, label in enumerate(found, first) if label != place), None)
            if not found or odd is not None:
                what = f'the label {odd} comes after a gap' if found else 'there is none'
                raise ValueError(f'{files[odd] if found else self.data_root}: the labels of {name!r} should count from '
                                 f'{first} without a gap, and {what}: {found[:20]}; if that is meant, say so with '
                                 f'parts={{{name!r}: […]}}')
        return {name: sorted(files) for name, files in where.items()}

    def _training_labels(self, names: set[str]) -> Iterator[tuple[str, Path, np.ndarray]]:
        if self.layout == 'hdf5':
            for file in self._h5_files('train'):
                _, parts = read_data(file, 'pid')
                for label, row in zip(read_labels(file, len(self._all)), parts):
                    if (name := list(self._all)[label]) in names:
                        yield name, file, row
        else:
            for shape in self._shapes(('train',)):
                if shape.category in names:
                    yield shape.category, shape.labels, self._labels_of(shape)

    # ---- shapes -----------------------------------------------------------------------------------------------------
    def load_data_list(self) -> list[dict]:
        lists = LISTS[self.split]
        items, files, read = self._h5_items(lists) if self.layout == 'hdf5' else self._text_items(lists)
        present = {category for _, category in items}
        for name in self.synsets:
            if name not in present:
                listed = ' and '.join(str(self._list_of(split)) for split in lists)
                raise ValueError(f'{listed}: no shape of the category {name!r} (synset {self.synsets[name]}); '
                                 'categories=[…] leaves it out')
        settings = self._cache_settings(
            layout=self.layout, normals=self.normals, labels=self._labels,
            parts={name: list(ids) for name, ids in self._metainfo['parts'].items()})
        self._clouds = cached_clouds(self.cache_dir, f'{self.data_root.resolve().name}_{self.split}', settings,
                                     [self.table, *files], self.data_root, read, len(items), sys.maxsize, True)
        labels = {name: label for label, name in enumerate(self.synsets)}
        return [dict(name=name, label=labels[category], row=row) for row, (name, category) in enumerate(items)]

    def load_cloud(self, entry: dict) -> dict:
        cloud = self._clouds[entry['row']]
        return dict(points=cloud[:, :-1], parts=cloud[:, -1].astype(np.int64))

    def _list_of(self, split: str) -> Path:
        """The list of a split, in the first of the folders in which it is looked for."""
        name = f'{split}_hdf5_file_list.txt' if self.layout == 'hdf5' else f'shuffled_{split}_file_list.json'
        folders = [self.list_dir] if self.list_dir is not None else [
            self.data_root / 'train_test_split', self.data_root, self.data_root.parent / 'train_test_split']
        for folder in folders:
            if (folder / name).is_file():
                return folder / name
        raise FileNotFoundError(f'{self.data_root}: there is no list {name} in {" or ".join(map(str, folders))}; '
                                'list_dir=… says where it is')

    def _shapes(self, lists: Sequence[str]) -> list[Shape]:
        """The shapes of the wanted categories that the lists name."""
        names, shapes = {synset: name for name, synset in self._all.items()}, []
        for listed in map(self._list_of, lists):
            for synset, name in read_list(listed):
                if synset not in names:
                    raise ValueError(f'{listed}: {synset}/{name} is of the synset {synset!r}, which {self.table} does '
                                     f'not name; {nearest(synset, names)}')
                if names[synset] in self.synsets:
                    shapes.append(self._shape(names[synset], synset, name))
        return shapes

    def _shape(self, category: str, synset: str, name: str) -> Shape:
        folder = self.data_root / synset
        if self.layout == 'v0':
            files = folder / 'points' / f'{name}.pts', folder / 'points_label' / f'{name}.seg'
        else:
            files = (folder / f'{name}.txt',) * 2
        return Shape(f'{synset}/{name}', category, *files)

    def _text_items(self, lists: Sequence[str]):
        shapes = self._shapes(lists)
        files = [file for shape in shapes for file in dict.fromkeys((shape.points, shape.labels))]
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f'{" and ".join(str(self._list_of(split)) for split in lists)}: {len(missing)} of '
                                    f'the {len(files)} files of the shapes there do not exist; the first is '
                                    f'{missing[0]}')
        items = [(shape.name, shape.category) for shape in shapes]
        return items, files, lambda: self._each(self._read_shape, zip(shapes))

    def _read_shape(self, shape: Shape) -> np.ndarray:
        if self.layout == 'normal':
            rows = read_table_of(shape.points, 7)
            points, labels = rows[:, :6 if self.normals else 3], rows[:, 6]
            labels = as_integers(labels, shape.labels)
        else:
            points, labels = read_table_of(shape.points, 3)[:, :3], self._labels_of(shape)
        if len(points) != len(labels):
            raise ValueError(f'{shape.points} has {len(points)} points and {shape.labels} {len(labels)} labels')
        return self._joined(points, labels, shape.category, str(shape.points), str(shape.labels))

    def _labels_of(self, shape: Shape) -> np.ndarray:
        if self.layout == 'normal':
            return as_integers(read_table_of(shape.labels, 7)[:, 6], shape.labels)
        try:
            numbers = np.array(shape.labels.read_text('utf-8-sig', errors='replace').split(), np.float64)
        except ValueError as error:
            raise ValueError(f'{shape.labels}: a label a row was expected: {error}') from error
        return as_integers(numbers, shape.labels)

    def _h5_files(self, split: str) -> list[Path]:
        listed = self._list_of(split)
        return [find_h5(self.data_root, line, listed) for line in read_lines(listed)]

    def _h5_items(self, lists: Sequence[str]):
        files, items, rows = [file for split in lists for file in self._h5_files(split)], [], []
        for file in files:
            for i, label in enumerate(read_labels(file, len(self._all))):
                if (category := list(self._all)[label]) in self.synsets:
                    items.append((f'{file.name}[{i}]', category))
                    rows.append((file, i))
        return items, files, lambda: self._read_h5(files, {row: category for row, (_, category) in zip(rows, items)})

    def _read_h5(self, files: Sequence[Path], wanted: Mapping[tuple[Path, int], str]) -> Iterator[np.ndarray]:
        for file in files:
            data, parts = read_data(file, 'pid')
            rows = (((file, i), *row) for i, row in enumerate(zip(data, parts)) if (file, i) in wanted)
            yield from self._each(lambda row, points, labels: self._of_row(wanted[row], points, labels, *row), rows)

    def _of_row(self, category: str, points: np.ndarray, labels: np.ndarray, file: Path, row: int) -> np.ndarray:
        name = f'{file}[{row}]'
        return self._joined(points[:, :3], as_integers(labels, name), category, name, name)

    def _each(self, read: Callable, sources: Iterable[tuple]) -> Iterator[np.ndarray]:
        return self._read_each(read, sources, 7 if self.normals else 4)

    def _joined(self, points: np.ndarray, labels: np.ndarray, category: str, name: str, file: str) -> np.ndarray:
        """Columns of the points and, last, their parts as the metainfo counts them; single precision holds both."""
        known = np.array(self._labels[category])
        place = np.searchsorted(known, labels).clip(max=len(known) - 1)
        wrong = np.flatnonzero(known[place] != labels)
        if len(wrong):
            raise ValueError(f'{file}: point {wrong[0]} has the label {labels[wrong[0]]}, which is none of the parts '
                             f'of {category!r}: {", ".join(map(str, known))}')
        parts = np.array(self._metainfo['parts'][category])[place]
        return np.concatenate([as_cloud(points, name), parts[:, None].astype(np.float32)], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def table_of(root: Path) -> Path:
    """The file that names the categories."""
    for name in ('synsetoffset2category.txt', 'all_object_categories.txt'):
        if (root / name).is_file():
            return root / name
    raise FileNotFoundError(f'{root}: there is neither synsetoffset2category.txt nor all_object_categories.txt, which '
                            'name the categories; data/README.md shows the layouts of ShapeNetPart')


def read_table(file: Path) -> dict[str, str]:
    """Category → synset, from rows ``name synset``."""
    table: dict[str, str] = {}
    for line in read_lines(file):
        words = line.split()
        if len(words) != 2 or not re.fullmatch(r'[\w-]+', words[1], re.ASCII):
            raise ValueError(f'{file}: the row {line!r} should be <category> <synset>')
        if words[0] in table or words[1] in table.values():
            raise ValueError(f'{file}: the row {line!r} names a category or a synset for the second time')
        table[words[0]] = words[1]
    if not table:
        raise ValueError(f'{file}: names no category')
    return table


def read_list(file: Path) -> list[tuple[str, str]]:
    """Synset and id of the shapes in a split list."""
    content = read_json(file)
    if not isinstance(content, list):
        raise ValueError(f'{file}: should hold a list of shapes, got {str(content)[:80]}')
    shapes: dict[tuple[str, str], None] = {}
    for line in content:
        match = ENTRY.fullmatch(line) if isinstance(line, str) else None
        if match is None:
            raise ValueError(f'{file}: {line!r} names no shape; shape_data/<synset>/<id> was expected')
        if match.groups() in shapes:
            raise ValueError(f'{file}: {line!r} stands there more than once')
        shapes[match.groups()] = None
    return list(shapes)


def detect_layout(root: Path, categories: Mapping[str, str]) -> str:
    """Which of the layouts a folder has."""
    if any((root / f'{split}_hdf5_file_list.txt').is_file() for split in LISTS):
        return 'hdf5'
    folders = [root / synset for synset in categories.values() if (root / synset).is_dir()]
    for folder in folders:
        if (folder / 'points').is_dir():
            return 'v0'
        if next(folder.glob('*.txt'), None) is not None:
            return 'normal'
    raise FileNotFoundError(f'{root}: has no layout of ShapeNetPart that is known: neither <synset>/points/<id>.pts '
                            'with <synset>/points_label/<id>.seg, nor <synset>/<id>.txt, nor '
                            '{split}_hdf5_file_list.txt with h5 files; data/README.md shows them')


def read_json(file: Path):
    try:
        return json.loads(file.read_text('utf-8-sig'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file}: is no JSON: {error}') from error


def read_table_of(file: Path, columns: int) -> np.ndarray:
    """Rows of at least so many numbers."""
    try:
        rows, _ = read_rows(file)
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from error
    if rows.shape[1] < columns:
        raise ValueError(f'{file}: rows of {columns} numbers were expected, they have {rows.shape[1]}')
    return rows


def as_integers(values: np.ndarray, name: str | Path) -> np.ndarray:
    """Labels, which a file may hold as ``12.000000``."""
    values = np.asarray(values)
    wrong = np.flatnonzero(~(np.abs(values) < 2**31) | (np.floor(values) != values))  # NaN is not below anything
    if len(wrong):
        raise ValueError(f'{name}: the label of point {wrong[0]} should be an integer, got {values[wrong[0]]}')
    return values.astype(np.int64)
