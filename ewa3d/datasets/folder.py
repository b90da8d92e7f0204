"""``FolderPointCloud``: people's own data, one folder a class."""
import logging
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ewa3d.datasets.base import PointDataset, require_folder
from ewa3d.datasets.cache import cached_clouds
from ewa3d.datasets.io import EXTENSIONS, MESH_POINTS, Cloud, read_cloud
from ewa3d.registry import DATASETS, nearest

__all__ = ['FolderPointCloud']

logger = logging.getLogger('ewa3d')
SPLITS = ('train', 'val', 'test')
# Lies beside clouds and is none: materials and pictures of meshes, parts, notes, what desktops leave behind.
COMPANIONS = frozenset(('.mtl', '.png', '.jpg', '.jpeg', '.md', '.json', '.db', '.ini', '.seg'))


@DATASETS.register_module()
class FolderPointCloud(PointDataset):
    """``class_name/*.{npy,npz,txt,xyz,csv,ply,pcd,off,obj,stl,h5}``, with optional levels ``train``, ``val``, ``test``
    above or below the classes (``train/chair/a.npy`` or ``chair/train/a.npy``).

    Classes are the names of the folders, sorted, the same for every split. Clouds may differ in size; points of meshes
    are drawn by area. Hidden files, pictures and notes beside the clouds are ignored, links are followed. The first use
    orders the clouds by farthest point sampling and keeps the result under ``cache_dir``.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``. Without levels everything is ``'train'``, and the other two are an
            error. ``None`` is everything, whatever the levels.
        classes: these classes in this order, instead of those that the folders name.
        extensions: read files with these only, for example ``['.npy']``.
        normals: columns 3 to 5 are normals; keep them. Formats that can tell are asked whether they are.
        num_features: columns to keep beyond xyz; by default 3 with normals, else 0.
        up_axis: which way is up, for the transforms that ask.
        max_points: how many points of a cloud are kept at most.
        mesh_points, mesh_seed: how the points of a mesh are drawn.

    Raises:
        FileNotFoundError: there is no folder.
        ValueError: no classes, only one, an empty class folder, an unknown extension, a file that cannot be read.
    """

    SPLITS = (*SPLITS, None)
    LEAST_CLASSES = 2

    def __init__(self, data_root: str | Path, split: str | None = 'train', classes: Sequence[str] | None = None,
                 extensions: Sequence[str] | None = None, normals: bool = False, num_features: int | None = None,
                 up_axis: str = 'z', max_points: int = 8192, mesh_points: int = MESH_POINTS, mesh_seed: int = 0,
                 **kwargs):
        if data_root is None:
            raise ValueError('FolderPointCloud needs data_root: the folder with the classes')
        root = require_folder(data_root, 'FolderPointCloud')
        self.normals = bool(normals)
        self.num_features = (3 if normals else 0) if num_features is None else num_features
        if self.num_features < (3 if normals else 0):
            raise ValueError(f'num_features={num_features} must be at least {3 if normals else 0}')
        if max_points < 1 or mesh_points < 1:
            raise ValueError(f'max_points={max_points} and mesh_points={mesh_points} must be at least 1')
        self.up_axis, self.max_points, self.mesh_points, self.mesh_seed = up_axis, max_points, mesh_points, mesh_seed
        self.extensions = check_extensions(extensions)
        self._wanted_classes = None if classes is None else tuple(classes)
        self._tree = Tree(root)
        super().__init__(root, split, **kwargs)

    def load_metainfo(self) -> dict:
        wanted = wanted_classes(self.data_root, self._tree.classes, self._wanted_classes)
        if len(wanted) < self.LEAST_CLASSES and self._wanted_classes is None:
            raise ValueError(f'{self.data_root}: holds only one class, {wanted[0]!r}; if that is meant, say so with '
                             f'classes={list(wanted)}')
        return dict(classes=wanted, up_axis=self.up_axis, normals=self.normals)

    def load_data_list(self) -> list[dict]:
        items = []
        for label, name in enumerate(self._metainfo['classes']):
            for folder in self._tree.folders(name, self.split):
                items += [(file, label) for file in self._files(folder)]
        if not items:
            raise ValueError(f'{self._what} has no samples')
        files = [file for file, _ in items]
        name = f'{self.data_root.resolve().name}_{self.split or "all"}'
        self._clouds = cached_clouds(self.cache_dir, name, self._settings(), self._sources(files), self.data_root,
                                     lambda: self._read_each(self._read_file, zip(files), self._columns),
                                     len(files), self.max_points)
        return [dict(name=str(file.relative_to(self.data_root)), label=label, row=row, fps_ordered=True)
                for row, (file, label) in enumerate(items)]

    def load_cloud(self, entry: dict) -> dict:
        return dict(points=self._clouds[entry['row']], max_points=self.max_points)

    def _settings(self) -> dict:
        """What the cached clouds depend on beside their files."""
        return self._cache_settings(features=self.num_features, normals=self.normals, mesh_points=self.mesh_points,
                                    mesh_seed=self.mesh_seed, classes=self._wanted_classes,
                                    extensions=self.extensions and sorted(self.extensions))

    def _sources(self, files: list[Path]) -> list[Path]:
        """All files that the clouds come from."""
        return files

    def _files(self, folder: Path) -> list[Path]:
        """The clouds in a class folder, sorted."""
        present = []
        for entry in listed(folder):
            present.append(Path(entry.path))
            if not _is(entry, 'file'):
                what = 'a folder inside a class' if _is(entry, 'dir') else 'a link to nothing'
                raise ValueError(f'{entry.path}: {what}, files were expected')
        known = self.extensions or EXTENSIONS
        files = [f for f in present if f.suffix.lower() in known]
        unknown = [f for f in present if f.suffix.lower() not in (EXTENSIONS | COMPANIONS)]
        if unknown and self.extensions is None:
            raise ValueError(f'{unknown[0]}: unknown extension {unknown[0].suffix!r}; known are '
                             f'{", ".join(sorted(EXTENSIONS))} (extensions=[…] chooses which files are read)')
        if not files:
            seen = Counter(f.suffix for f in present)
            raise ValueError(f'{folder}: an empty class folder; files {", ".join(sorted(known))} were expected, '
                             f'there are {dict(seen) if seen else "none"}')
        return files

    @property
    def _columns(self) -> int:
        """How many columns are read of a file."""
        return 3 + self.num_features

    def _read_file(self, file: Path) -> np.ndarray:
        return self._wanted_columns(file, self._read_all_columns(file))

    def _wanted_columns(self, file: Path, cloud: Cloud) -> np.ndarray:
        wanted = 3 + self.num_features
        if self.normals and cloud.normals is False:
            raise ValueError(f'{file}: normals=True, but the file has none')
        if cloud.points.shape[1] < wanted:
            raise ValueError(f'{file}: {wanted} columns are wanted (xyz and num_features={self.num_features}), it '
                             f'has {cloud.points.shape[1]}')
        return cloud.points[:, :wanted]

    def _read_all_columns(self, file: Path) -> Cloud:
        rng = np.random.default_rng((self.mesh_seed, zlib.crc32(str(file.relative_to(self.data_root)).encode())))
        return read_cloud(file, self.mesh_points, rng)


class Tree:
    """Where the classes and the splits of a folder are."""

    def __init__(self, root: Path):
        self.root = root
        top = subfolders(root)
        if not top:
            raise ValueError(f'{root}: has no class folders; <class>/<files> or <split>/<class>/<files> was expected')
        _check_case(top)
        levels = [folder for folder in top if folder.name in SPLITS]
        if levels and len(levels) < len(top):
            strange = next(folder.name for folder in top if folder.name not in SPLITS)
            raise ValueError(f'{root}: the folder {strange!r} lies beside {levels[0].name!r}; either all folders there '
                             f'are splits ({", ".join(SPLITS)}) or all are classes')
        if levels:
            self._found = {(c.name, level.name): c for level in levels for c in subfolders(level)}
        else:
            self._found = {}
            for folder in top:
                inner = subfolders(folder)
                _check_case(inner)
                below = [f for f in inner if f.name in SPLITS]
                self._found |= {(folder.name, f.name): f for f in below} or {(folder.name, None): folder}
            self._check_levels()
        if not self._found:
            raise ValueError(f'{root}: the folders {[folder.name for folder in levels]} hold no class folders')
        self.classes = sorted({name for name, _ in self._found})
        self.splits = [split for split in SPLITS if any(split == s for _, s in self._found)]

    def _check_levels(self) -> None:
        """Splits below some classes only would put the other classes nowhere."""
        flat = [name for name, split in self._found if split is None]
        if flat and len(flat) < len(self._found):
            raise ValueError(f'{self.root}: the class {flat[0]!r} has no folders {", ".join(SPLITS)}, other classes '
                             f'have')

    def folders(self, name: str, split: str | None) -> list[Path]:
        """The folders of a class in a split (in all splits: ``None``)."""
        if split is not None and not self.splits and split != 'train':
            raise ValueError(f'{self.root}: has no folders {", ".join(SPLITS)}, so there is no split {split!r}: sort '
                             f'the files into them (train/<class>/… or <class>/train/…)')
        if split is not None and self.splits and split not in self.splits:
            raise ValueError(f'{self.root}: has no split {split!r}; there are {", ".join(self.splits)}')
        return [folder for (category, level), folder in self._found.items()
                if category == name and (split is None or level in (None, split))]


def wanted_classes(root: Path, found: Sequence[str], wanted: Sequence[str] | None) -> tuple[str, ...]:
    """``wanted``, all of which have to be among the class folders ``found``; by default these."""
    for name in wanted or ():
        if name not in found:
            raise ValueError(f'{root}: has no class folder {name!r}; {nearest(name, found)}')
    return tuple(wanted or found)


def _check_case(folders: list[Path]) -> None:
    """``Train`` beside ``Test`` would silently be two classes."""
    for folder in folders:
        if folder.name not in SPLITS and folder.name.lower() in SPLITS:
            raise ValueError(f'{folder}: the folder of a split is called {folder.name.lower()!r}; rename it')


def listed(folder: str | Path) -> list[os.DirEntry]:
    """What is in a folder, hidden files left out, by name. What an entry is, a file or a folder, it knows by itself: a
    hundred thousand of them are listed without asking the disk about each."""
    with os.scandir(folder) as entries:
        return sorted((entry for entry in entries if not entry.name.startswith('.')), key=lambda entry: entry.name)


def _is(entry: os.DirEntry, what: str) -> bool:
    """Whether an entry is a ``'file'`` or a ``'dir'``, or a link to one; a link that leads in a circle is neither."""
    try:
        return entry.is_dir() if what == 'dir' else entry.is_file()
    except OSError:
        return False


def subfolders(folder: Path) -> list[Path]:
    return [Path(entry.path) for entry in listed(folder) if _is(entry, 'dir')]


def check_extensions(extensions: Sequence[str] | None) -> frozenset | None:
    """Lower-case extensions with their dot, all of them readable."""
    if extensions is None:
        return None
    if isinstance(extensions, str):
        raise TypeError(f"extensions is a list like ['.npy'], got {extensions!r}")
    chosen = frozenset('.' + str(e).lower().lstrip('.') for e in extensions)
    for extension in sorted(chosen - EXTENSIONS):
        raise ValueError(f'no reader for files {extension!r}; {nearest(extension, EXTENSIONS)}')
    return chosen
