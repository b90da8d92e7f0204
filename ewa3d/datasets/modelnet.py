"""ModelNet10 and ModelNet40 in the layouts in which people have them."""
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PureWindowsPath

import numpy as np

from ewa3d.checks import check_integer
from ewa3d.datasets.base import PointDataset, require_folder
from ewa3d.datasets.cache import cached_clouds
from ewa3d.datasets.h5 import check_range, read_data, read_labels
from ewa3d.datasets.io import MESH_POINTS, as_cloud, read_cloud
from ewa3d.datasets.pickles import read_numpy_pickle
from ewa3d.registry import DATASETS, nearest

__all__ = ['ModelNet']

CLASSES = {
    10: ('bathtub', 'bed', 'chair', 'desk', 'dresser', 'monitor', 'night_stand', 'sofa', 'table', 'toilet'),
    40: ('airplane', 'bathtub', 'bed', 'bench', 'bookshelf', 'bottle', 'bowl', 'car', 'chair', 'cone', 'cup',
         'curtain', 'desk', 'door', 'dresser', 'flower_pot', 'glass_box', 'guitar', 'keyboard', 'lamp', 'laptop',
         'mantel', 'monitor', 'night_stand', 'person', 'piano', 'plant', 'radio', 'range_hood', 'sink', 'sofa',
         'stairs', 'stool', 'table', 'tent', 'toilet', 'tv_stand', 'vase', 'wardrobe', 'xbox')}
DEFAULT_ROOT = {10: 'data/modelnet10_ply_hdf5_1024', 40: 'data/modelnet40_normal_resampled'}
LAYOUTS = ('dat', 'txt', 'h5', 'off')


@DATASETS.register_module()
class ModelNet(PointDataset):
    """ModelNet10 or ModelNet40 (Wu et al., CVPR 2015), from one of four layouts:

    * ``txt``: ``modelnet40_normal_resampled``: lists ``modelnet{10,40}_{train,test}.txt`` of ids, class names in
      ``modelnet{10,40}_shape_names.txt``, clouds ``<class>/<id>.txt`` with rows ``x,y,z,nx,ny,nz``; y is up;
    * ``dat``: the file ``modelnet40_{split}_8192pts_fps.dat`` that Point-BERT and Point-MAE write from it; y is up. It
      is a pickle; only arrays are read from it and nothing in it is executed;
    * ``h5``: ``train_files.txt`` and ``test_files.txt`` name files with ``data``, ``label`` and optionally ``normal``;
      y is up in ``modelnet40_ply_hdf5_2048``, z in ``modelnet10_ply_hdf5_1024``;
    * ``off``: the original meshes, ``<class>/{train,test}/*.off``; z is up. Points are drawn by area.

    The first use orders the clouds by farthest point sampling and keeps the result under ``cache_dir``.

    Args:
        data_root: where it is; by default ``data/modelnet10_ply_hdf5_1024`` or ``data/modelnet40_normal_resampled``.
        variant: 10 or 40 classes.
        split: ``'train'`` or ``'test'``; ModelNet has no validation split.
        layout: one of the above; ``'auto'`` takes the first whose files are there, in the order dat, txt, h5, off.
        normals: keep normals as columns 3 to 5; a layout without them is an error.
        metainfo: ``dict(up_axis='y')`` for files that are turned another way than their layout usually is.
        max_points: how many points of a cloud are kept at most.
        mesh_points, mesh_seed: how the points of a mesh are drawn.

    Raises:
        FileNotFoundError: no folder, or none of the layouts in it.
        ValueError: another variant, split or layout; naming the file: one that cannot be read.
    """

    SPLITS = ('train', 'test')

    def __init__(self, data_root: str | Path | None = None, variant: int = 40, split: str = 'train',
                 layout: str = 'auto', normals: bool = False, max_points: int = 8192, mesh_points: int = MESH_POINTS,
                 mesh_seed: int = 0, **kwargs):
        if not isinstance(variant, int) or variant not in CLASSES:
            raise ValueError(f'ModelNet: variant must be 10 or 40, got {variant!r}')
        if layout not in ('auto', *LAYOUTS):
            raise ValueError(f'ModelNet: there is no layout {layout!r}; {nearest(layout, ("auto", *LAYOUTS))}')
        if split not in self.SPLITS:  # before the layout is looked for by it
            raise ValueError(f"ModelNet has the splits 'train' and 'test', got {split!r}")
        for name, value, least in (('max_points', max_points, 1), ('mesh_points', mesh_points, 1),
                                   ('mesh_seed', mesh_seed, 0)):
            check_integer(f'ModelNet: {name}', value, least)
        self.variant, self.normals, self.max_points = variant, bool(normals), max_points
        self.mesh_points, self.mesh_seed = mesh_points, mesh_seed
        root = require_folder(data_root or DEFAULT_ROOT[variant], f'ModelNet{variant}')
        self.layout = detect_layout(root, variant, split) if layout == 'auto' else layout
        super().__init__(root, split, **kwargs)

    def load_metainfo(self) -> dict:
        z_up = self.layout == 'off' or (self.layout == 'h5' and self.variant == 10)
        return dict(classes=self._class_names(), up_axis='z' if z_up else 'y', normals=self.normals,
                    layout=self.layout)

    def load_data_list(self) -> list[dict]:
        items, files, read = getattr(self, f'_list_{self.layout}')()
        if not items:
            raise ValueError(f'{self._what}: the lists of the layout {self.layout!r} are empty')
        settings = self._cache_settings(layout=self.layout, normals=self.normals)
        if self.layout == 'off':
            settings.update(mesh_points=self.mesh_points, mesh_seed=self.mesh_seed)
        self._clouds = cached_clouds(self.cache_dir, f'modelnet{self.variant}_{self.split}', settings, files,
                                     self.data_root, read, len(items), self.max_points, self.layout == 'dat')
        return [dict(name=name, label=label, row=row, fps_ordered=True) for row, (name, label) in enumerate(items)]

    def load_cloud(self, entry: dict) -> dict:
        return dict(points=self._clouds[entry['row']], max_points=self.max_points)

    # ---- the layouts: the items (name, label), the files they come from, a function that yields their clouds --------
    def _list_txt(self):
        classes = {name: i for i, name in enumerate(self._class_names())}
        listed = self.data_root / f'modelnet{self.variant}_{self.split}.txt'
        items, files = [], []
        for name in read_lines(listed):
            category = name.rpartition('_')[0]
            if category not in classes:
                raise ValueError(f'{listed}: {name!r} belongs to no class; a line is <class>_<number> with '
                                 f'{nearest(category, classes)}')
            files.append(self.data_root / category / f'{name}.txt')
            items.append((name, classes[category]))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f'{listed} lists {len(files)} shapes, {len(missing)} of them are not there; the '
                                    f'first is {missing[0]}')
        return items, [listed, *files], lambda: self._each(self._read_text, zip(files))

    def _read_text(self, file: Path) -> np.ndarray:
        return self._columns(read_cloud(file).points, file)

    def _list_dat(self):
        file = find_dat(self.data_root, self.variant, self.split)
        if file is None:
            raise FileNotFoundError(f'{self.data_root}: there is no modelnet{self.variant}_{self.split}_*pts_fps.dat')
        clouds, labels = read_dat(file)
        items = [(f'{file.name}[{i}]', label) for i, label in enumerate(labels)]
        check_range(file, labels, len(self._class_names()))
        named = [(cloud, f'{file}[{i}]') for i, cloud in enumerate(clouds)]
        return items, [file], lambda: self._each(lambda *cloud: self._columns(as_cloud(*cloud), file), named)

    def _list_h5(self):
        listed = self.data_root / f'{self.split}_files.txt'
        files = [find_h5(self.data_root, line, listed) for line in read_lines(listed)]
        items = []
        for file in files:
            items += [(f'{file.name}[{i}]', label) for i, label in
                      enumerate(read_labels(file, len(self._class_names())))]
        return items, [listed, *files], lambda: self._read_h5(files)

    def _read_h5(self, files: list[Path]) -> Iterator[np.ndarray]:
        for file in files:
            data, *normals = read_data(file, *(['normal'] if self.normals else []))
            if normals and normals[0].shape != data.shape:
                raise ValueError(f"{file}: 'normal' has the shape {normals[0].shape}, 'data' {data.shape}")
            clouds = np.concatenate([data[..., :3], *normals], axis=-1)
            yield from self._each(as_cloud, ((cloud, f'{file}[{i}]') for i, cloud in enumerate(clouds)))

    def _list_off(self):
        items, files = [], []
        for label, category in enumerate(self._class_names()):
            folder = self.data_root / category / self.split
            found = sorted(f for f in folder.glob('*') if f.suffix.lower() == '.off' and not f.name.startswith('.'))
            if folder.is_dir() and not found:
                raise ValueError(f'{folder}: an empty class folder, *.off files were expected')
            files += found
            items += [(file.stem, label) for file in found]
        if not items:
            raise FileNotFoundError(f'{self._what}: there is no <class>/{self.split}/*.off with a class of ModelNet'
                                    f'{self.variant} ({self._class_names()[0]!r}, …)')
        return items, files, lambda: self._each(self._sample, zip(files))

    def _sample(self, file: Path) -> np.ndarray:
        rng = np.random.default_rng((self.mesh_seed, zlib.crc32(file.name.encode())))
        cloud = read_cloud(file, self.mesh_points, rng)
        if not cloud.normals:
            raise ValueError(f'{file}: the mesh has no faces')
        return self._columns(cloud.points, file)

    # ---- shared by them ---------------------------------------------------------------------------------------------
    def _each(self, read: Callable, sources: Iterable[tuple]) -> Iterator[np.ndarray]:
        return self._read_each(read, sources, 6 if self.normals else 3)

    def _columns(self, points: np.ndarray, file: Path) -> np.ndarray:
        wanted = 6 if self.normals else 3
        if points.shape[1] < wanted:
            raise ValueError(f'{file}: normals=True needs rows of 6 numbers, it has {points.shape[1]}')
        return points[:, :wanted]

    def _class_names(self) -> tuple[str, ...]:
        file = {'h5': 'shape_names.txt', 'off': ''}.get(self.layout, f'modelnet{self.variant}_shape_names.txt')
        if not file or not (self.data_root / file).is_file():
            return CLASSES[self.variant]
        names = tuple(read_lines(self.data_root / file))
        if len(names) > self.variant:
            raise ValueError(f'{self.data_root / file}: lists {len(names)} classes; variant={self.variant} expects '
                             f'{self.variant}')
        return names


def detect_layout(root: Path, variant: int, split: str) -> str:
    """The layout of a folder; ``FileNotFoundError`` that says what was looked for."""
    if find_dat(root, variant, split) is not None:
        return 'dat'
    if (root / f'modelnet{variant}_{split}.txt').is_file():
        return 'txt'
    if (root / f'{split}_files.txt').is_file():
        return 'h5'
    if any((root / category / part).is_dir() for category in CLASSES[variant] for part in ModelNet.SPLITS):
        return 'off'
    raise FileNotFoundError(
        f'{str(root)!r} has no layout of ModelNet{variant} that is known: neither modelnet{variant}_{split}.txt with '
        f'<class>/<id>.txt, nor modelnet{variant}_{split}_8192pts_fps.dat, nor {split}_files.txt with h5 files, nor '
        f'<class>/{split}/*.off; data/README.md shows them')


def find_dat(root: Path, variant: int, split: str) -> Path | None:
    """The official cache with the most points."""
    sizes = {int(match[1]): file for file in root.glob(f'modelnet{variant}_{split}_*pts_fps.dat')
             if (match := re.search(r'_(\d+)pts_fps\.dat$', file.name))}
    return sizes[max(sizes)] if sizes else None


def find_h5(root: Path, line: str, listed: Path) -> Path:
    """The h5 file that a line of the list means: official lists name it from the folder of their own project."""
    name = PureWindowsPath(line).name  # splits at / and at \
    for candidate in (root / line, root / name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f'{root / name}: listed in {listed.name}, but not there')


def read_lines(file: Path) -> list[str]:
    """The lines of a list that are not empty, without the blanks around them.

    Raises:
        FileNotFoundError: there is no such list. ValueError: a line stands in it twice.
    """
    if not file.is_file():
        raise FileNotFoundError(f'{file}: there is no such list')
    lines = [line.strip() for line in file.read_text('utf-8-sig', errors='replace').splitlines() if line.strip()]
    twice = [line for line, count in Counter(lines).items() if count > 1]
    if twice:
        raise ValueError(f'{file}: {len(twice)} of its lines stand there more than once, the first is '
                         f'{twice[0][:100]!r}')
    return lines


def read_dat(file: Path) -> tuple[list[np.ndarray], list[int]]:
    """Clouds and labels of an official ``*_fps.dat``: a pickle of ``[clouds, labels]``."""
    content = read_numpy_pickle(file)
    expected = f'{file}: should hold [list of clouds (N, 6), list of labels]'
    if not isinstance(content, (list, tuple)) or len(content) != 2 or len(content[0]) != len(content[1]):
        raise ValueError(expected)
    clouds, labels = content
    if not all(isinstance(cloud, np.ndarray) for cloud in clouds):
        raise ValueError(expected)
    try:
        return list(clouds), [int(np.asarray(label).reshape(())) for label in labels]
    except (TypeError, ValueError) as error:
        raise ValueError(f'{expected}, one integer a cloud') from error
