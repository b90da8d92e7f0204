"""Videos with labels: files and folders of frames, by a list or by folders of classes; and generated ones."""
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ewa3d.checks import check_integer, check_number
from ewa3d.datasets.base import DATA_ERRORS, PointDataset, merge_metainfo, require_folder
from ewa3d.datasets.clips import VIDEOS, check_decodes, check_video
from ewa3d.datasets.folder import Tree, wanted_classes
from ewa3d.registry import DATASETS, nearest

__all__ = ['MovingShapes', 'VideoDataset']

LABEL = re.compile(r'\d{1,6}', re.ASCII)  # without names of classes there are as many as the largest one says


class ClipDataset(PointDataset):
    """What data sets of videos share. All of ``PointDataset`` holds but what a sample starts with: ``dict(path or video
    (T, H, W, 3) uint8, label, name, index, rng)``; ``LoadClip`` chooses frames and reads them.

    ``load_data_list`` gives ``path`` (a video file or a folder of frames) or ``video`` (an array) and ``label``.
    """

    def _start(self, index: int) -> dict:
        entry, name = self._data_list[index], self._name(index)
        results = {**self._defaults(index), **entry, 'name': name}
        if 'video' in results:
            results['video'] = check_video(results['video'], name).view()
            results['video'].flags.writeable = False
        elif 'path' not in results:
            raise KeyError(f"an entry of the data list needs 'video' or 'path', got {sorted(entry)}")
        return results

    def _failure(self, index: int) -> str:
        entry = self._data_list[index]
        if 'path' not in entry:
            return super()._failure(index)
        try:
            check_decodes(entry['path'], entry.get('frames', '*'))
        except DATA_ERRORS as error:
            return str(error)
        return ''

    def _defaults(self, index: int) -> dict:
        return dict(index=index, rng=super()._defaults(index)['rng'])


@DATASETS.register_module()
class VideoDataset(ClipDataset):
    """Videos: files, or folders of frames, one a video.

    * By a list, ``ann_file``: a line a video, ``path label`` or, of folders, ``path number_of_frames label`` (which is
      not needed), as Kinetics and Something-Something lists have it. Empty lines are skipped.
    * Without one, by folders: ``class_name/a.mp4`` or ``class_name/a/img_00001.jpg``, with optional levels ``train``,
      ``val``, ``test`` above or below the classes.

    Args:
        data_root: what paths in the list are relative to, or the folder with the classes.
        split: of the folders; with a list it is a name only.
        ann_file: the list, relative to the working folder or to ``data_root``.
        frames: in folders of frames, files of these names are frames: ``'img_*.jpg'`` leaves optical flow out.
        classes: the names of the classes in the order of their labels; of folders, these classes only. By default the
            folders' names, sorted, or the numbers of the list, ``'0'`` to the largest.

    Raises:
        FileNotFoundError: no such folder or list. ValueError: a line that is none, a class without videos, a label
            without a class.
    """
    SPLITS = ('train', 'val', 'test', None)

    def __init__(self, data_root: str | Path, split: str | None = 'train', ann_file: str | Path | None = None,
                 frames: str = '*', classes: Sequence[str] | None = None, **kwargs):
        if data_root is None:
            raise ValueError('VideoDataset needs data_root: the folder of the videos')
        root = require_folder(data_root, 'VideoDataset')
        self.frames = frames
        self._wanted = None if classes is None else tuple(classes)
        self._lines = self._tree = None
        if ann_file is None:
            self._tree = Tree(root)
        else:
            self._lines = read_list(_found(ann_file, root), root)
        super().__init__(root, split, **kwargs)

    def load_metainfo(self) -> dict:
        if self._tree is None:
            return dict(classes=self._wanted or tuple(map(str, range(1 + max(label for _, label in self._lines)))))
        return dict(classes=wanted_classes(self.data_root, self._tree.classes, self._wanted))

    def load_data_list(self) -> list[dict]:
        found = self._lines
        if self._tree is not None:
            found = [(path, label) for label, name in enumerate(self._metainfo['classes'])
                     for folder in self._tree.folders(name, self.split) for path in videos_in(folder)]
        return [dict(path=path, label=label, name=str(path.relative_to(self.data_root)), frames=self.frames)
                for path, label in found]


def _found(ann_file: str | Path, root: Path) -> Path:
    for path in (Path(ann_file).expanduser(), root / ann_file):
        if path.is_file():
            return path
    raise FileNotFoundError(f'VideoDataset: there is no list {str(ann_file)!r}, neither here nor in {root}')


def read_list(file: Path, root: Path) -> list[tuple[Path, int]]:
    """Paths and labels of a list (see :class:`VideoDataset`)."""
    entries = []
    try:
        lines = file.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f'{file}: a list in UTF-8 was expected: {error}') from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2 or not LABEL.fullmatch(words[-1]):
            raise ValueError(f"{file}: line {number}: 'path label' with a label from 0 to 999999 was expected, got "
                             f'{line[:200]!r}')
        name = line.strip()[:-len(words[-1])].strip()
        shorter = name[:-len(words[-2])].strip()
        if len(words) > 2 and words[-2].isdigit() and not (root / name).exists() and (root / shorter).is_dir():
            name = shorter  # what stood between them is the number of frames
        entries.append((root / name, int(words[-1])))
    if not entries:
        raise ValueError(f'{file}: the list is empty')
    return entries


def videos_in(folder: Path) -> list[Path]:
    """The videos and folders of frames in a class folder, sorted; ``ValueError`` where there is none."""
    found = sorted(f for f in folder.iterdir() if not f.name.startswith('.')
                   and (f.is_dir() or f.suffix.lower() in VIDEOS))
    if not found:
        raise ValueError(f'{folder}: an empty class folder; videos ({", ".join(sorted(VIDEOS))}) or folders of frames '
                         'were expected')
    return found


@DATASETS.register_module()
class MovingShapes(ClipDataset):
    """A light shape that moves left, right, up or down, or turns one way or the other: made from a seed, no files.

    A shape that leaves the picture comes in again on the other side, and it starts anywhere and in any pose, so that a
    single frame says nothing about the class; the same frames the other way round are another class, so that without
    their order half of the classes look like the other half. Sizes, colours, speeds and noise are drawn for every clip.

    Sample ``i`` of a split depends on ``(data_seed, split, i)`` and the options alone; its class is ``i`` modulo their
    number.

    Args:
        num_samples: by default 1800 for training, 600 for validation and for test.
        num_frames, size: of a clip, frames of ``size`` × ``size``.
        noise: standard deviation of the noise, where colours go from 0 to 1.
        classes: some of the six, in this order; all unless given.
        data_seed: of the clips; ``seed`` is the augmentation's.

    Raises:
        TypeError, ValueError: a number out of range, a class that is none of the six or comes twice.
    """
    METAINFO: ClassVar[dict] = dict(classes=('left', 'right', 'up', 'down', 'clockwise', 'anticlockwise'))
    MOTIONS = ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, 1), (0, 0, -1))  # signs of x, y (down) and angle
    SPLITS = ('train', 'val', 'test')
    NAMED = False

    def __init__(self, num_samples: int | None = None, num_frames: int = 8, size: int = 32, noise: float = 0.02,
                 classes: Sequence[str] | None = None, split: str = 'train', data_seed: int = 0, **kwargs):
        if num_samples is None:
            num_samples = 1800 if split == 'train' else 600
        for name, value, least in (('num_samples', num_samples, 1), ('num_frames', num_frames, 1), ('size', size, 8),
                                   ('data_seed', data_seed, 0)):
            check_integer(f'MovingShapes: {name}', value, least)
        self.noise = check_number('MovingShapes: noise', noise, '[0, 1]')
        self.num_samples, self.num_frames, self.size, self.data_seed = num_samples, num_frames, size, data_seed
        known = self.METAINFO['classes']
        self.classes = merge_metainfo(dict(classes=known if classes is None else classes))['classes']
        for name in self.classes:
            if name not in known:
                raise ValueError(f'MovingShapes: no class {name!r}; {nearest(name, known)}')
        if not self.classes:
            raise ValueError(f'MovingShapes: classes is empty; choose from {", ".join(known)}')
        super().__init__(split=split, **kwargs)

    def load_metainfo(self) -> dict:
        return dict(classes=self.classes)

    def load_data_list(self) -> list[dict]:
        names = self.classes
        return [dict(name=f'{names[i % len(names)]}_{i:05d}', label=i % len(names), video=self.make(i))
                for i in range(self.num_samples)]

    def make(self, i: int) -> np.ndarray:
        """Clip ``i``: ``(num_frames, size, size, 3)`` uint8."""
        rng = np.random.default_rng((self.data_seed, self.SPLITS.index(self.split), i))
        time = np.arange(self.num_frames)
        motion = self.MOTIONS[self.METAINFO['classes'].index(self.classes[i % len(self.classes)])]
        speed = rng.uniform(0.06, 0.12)  # of the width a frame
        turn = rng.uniform(0.25, 0.5)  # radians a frame
        x, y, angle = (start + sign * rate * time for start, sign, rate in zip(
            rng.random(3) * (1, 1, 2 * np.pi), motion, (speed, speed, turn)))
        shape = drawn(self.size, x, y, angle, rng.uniform(0.2, 0.3), rng.uniform(0.5, 0.9))[..., None]
        ground, colour = rng.uniform(0, 0.4, 3), rng.uniform(0.6, 1, 3)
        clip = ground + (colour - ground) * shape + self.noise * rng.standard_normal((*shape.shape[:3], 3))
        return np.round(255 * clip.clip(0, 1)).astype(np.uint8)


def drawn(size: int, x: np.ndarray, y: np.ndarray, angle: np.ndarray, radius: float, flatness: float) -> np.ndarray:
    """A cut ellipse at ``(x, y)``, turned by ``angle`` (clockwise, y down), in a picture that goes on over its edges.

    Shape:
        - x, y, angle ``(T,)``, in widths and radians; returns ``(T, size, size)`` in ``[0, 1]``, smooth at the rim.
    """
    grid = (np.arange(size) + 0.5) / size
    u = (grid[None, None, :] - x[:, None, None] + 0.5) % 1 - 0.5
    v = (grid[None, :, None] - y[:, None, None] + 0.5) % 1 - 0.5
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    along, across = u * cos + v * sin, v * cos - u * sin
    rim = radius - np.sqrt(along ** 2 + (across / flatness) ** 2)
    return (np.minimum(rim, along + 0.3 * radius) * size + 0.5).clip(0, 1)  # cut off on one side: it has a front
