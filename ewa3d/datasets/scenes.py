"""Scenes with boxes: ScanNet and SUN RGB-D as VoteNet prepares them, and people's own."""
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np

from ewa3d.checks import is_number
from ewa3d.datasets.announced import check_archive
from ewa3d.datasets.base import PointDataset, require_folder
from ewa3d.datasets.io import EXTENSIONS, as_cloud, read_cloud
from ewa3d.datasets.modelnet import read_lines
from ewa3d.registry import DATASETS, nearest

__all__ = ['FolderScenes', 'SceneDataset', 'ScanNetDetection', 'SUNRGBDDetection', 'check_boxes']

SCANNET = {3: 'cabinet', 4: 'bed', 5: 'chair', 6: 'sofa', 7: 'table', 8: 'door', 9: 'window', 10: 'bookshelf',
           11: 'picture', 12: 'counter', 14: 'desk', 16: 'curtain', 24: 'refrigerator', 28: 'shower_curtain',
           33: 'toilet', 34: 'sink', 36: 'bathtub', 39: 'garbage_bin'}  # NYU40's number → name
SUNRGBD = ('bed', 'table', 'sofa', 'chair', 'toilet', 'desk', 'dresser', 'night_stand', 'bookshelf', 'bathtub')
SCANNET_COLOR = (109.8, 97.2, 83.8)  # the mean that VoteNet subtracts


class SceneDataset(PointDataset):
    """Scenes whose samples have ``boxes`` ``(M, 7)`` float32 (see :mod:`ewa3d.ops.boxes`) and ``box_labels`` ``(M,)``
    int64 beside their ``points``; ``M`` may be 0.

    A subclass gives them in an entry of :meth:`load_data_list` or returns them from :meth:`load_cloud`.
    """

    def _start(self, index: int) -> dict:
        results = super()._start(index)
        entry, name = self._data_list[index], results['name']
        results['boxes'], results['box_labels'] = check_boxes(
            results.get('boxes'), results.get('box_labels'), str(entry.get('boxes_path', name)),
            self._metainfo.get('classes'))
        return results


def check_boxes(boxes, labels, name: str, classes: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """``boxes`` ``(M, 7)`` float32 and ``labels`` ``(M,)`` int64, or an error that names the scene or file.

    Raises:
        KeyError: there are none. TypeError, ValueError: another shape, values that are not finite, sizes that are not
            positive, labels outside of the classes.
    """
    if boxes is None or labels is None:
        raise KeyError(f"{name}: a scene needs 'boxes' (M, 7) and 'box_labels' (M,)")
    boxes, labels = np.asarray(boxes), np.asarray(labels)
    if boxes.size == 0 and labels.size == 0:
        return np.zeros((0, 7), np.float32), np.zeros(0, np.int64)
    if boxes.ndim != 2 or boxes.shape[1] != 7 or labels.shape != boxes.shape[:1]:
        raise ValueError(f'{name}: boxes (M, 7) with a label each were expected, got {boxes.shape} and {labels.shape}')
    if boxes.dtype.kind not in 'fiu' or labels.dtype.kind not in 'iu':
        raise TypeError(f'{name}: boxes are numbers and labels integers, got {boxes.dtype} and {labels.dtype}')
    with np.errstate(over='ignore'):
        boxes = boxes.astype(np.float32)
    for i, box in enumerate(boxes):
        if not np.isfinite(box).all():
            raise ValueError(f'{name}: box {i} is not finite: {box.tolist()}')
        if not (box[3:6] > 0).all():
            raise ValueError(f'{name}: box {i} has the sizes {box[3:6].tolist()}, which must be positive')
    wrong = labels[(labels < 0) | (labels >= (len(classes) if classes is not None else np.inf))]
    if len(wrong):
        raise ValueError(f'{name}: the label {wrong[0]} is not one of the '
                         f'{len(classes) if classes is not None else ""} classes (counted from 0)')
    return boxes, labels.astype(np.int64)


def read_array(path: Path, columns: int, key: str | None = None) -> np.ndarray:
    """An array of rows from a ``npy`` file, or a ``npz`` file's ``key``; an empty one is ``(0, columns)``.

    Raises:
        FileNotFoundError, ValueError: naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such file')
    try:
        check_archive(path)
        found = np.load(path, allow_pickle=False)
        if key is not None:
            with found as file:
                found = file[key]
    except Exception as error:  # a broken archive raises errors of zipfile, pickle and others
        raise ValueError(f'{path}: cannot be read{f" as an archive with {key!r}" if key else ""}: {error}') from error
    if found.size == 0:
        return np.zeros((0, columns))
    if found.ndim != 2 or found.shape[1] < columns or found.dtype.kind not in 'fiu':
        raise ValueError(f'{path}: rows of {columns} numbers were expected, got {found.shape} of {found.dtype}')
    return found


def labels_of(numbers: np.ndarray, known: Mapping[int, int], path: Path) -> np.ndarray:
    """The labels of class numbers as a file has them."""
    wrong = [number for number in numbers.tolist() if number not in known]
    if wrong:
        raise ValueError(f'{path}: a box is of the class {wrong[0]:g}, which is none of {", ".join(map(str, known))}')
    return np.array([known[int(number)] for number in numbers], np.int64)


@DATASETS.register_module()
class ScanNetDetection(SceneDataset):
    """ScanNet v2 (Dai et al. 2017) with boxes along the axes, as VoteNet prepares it: ``{scene}_vert.npy`` (rows
    ``x y z r g b``) and ``{scene}_bbox.npy`` (rows centre, sizes, NYU40 class), 18 classes. The files of its instance
    and semantic labels are not needed.

    The list of a split is ``scannetv2_{split}.txt``, or else ``scannetv2_{split}_subset.txt``, in the folder of the
    scenes, beside it, or in ``meta_data`` in either place.

    Args:
        data_root: by default ``data/scannet_train_detection_data``.
        split: ``'train'``, ``'val'`` or ``'test'``.
        color: keep colours as columns 3 to 5, around 0 as VoteNet scales them.
        list_file: a list of scenes, one a line, instead of the split's.

    Raises:
        FileNotFoundError: a folder, a list, or files of listed scenes (how many, and the first) are not there.
        ValueError: naming the file: one that cannot be read, a class that is none of the 18, a box without a size.
    """

    METAINFO: ClassVar[dict] = dict(classes=tuple(SCANNET.values()), up_axis='z')
    SPLITS = ('train', 'val', 'test')

    def __init__(self, data_root: str | Path | None = None, split: str = 'train', color: bool = False,
                 list_file: str | Path | None = None, **kwargs):
        root = require_folder(data_root or 'data/scannet_train_detection_data', 'ScanNetDetection')
        self.color, self.list_file = bool(color), None if list_file is None else Path(list_file).expanduser()
        super().__init__(root, split, **kwargs)

    def load_data_list(self) -> list[dict]:
        listed = self.list_file or self._list_of_split()
        scenes = read_lines(listed)
        entries = [dict(name=scene, path=self.data_root / f'{scene}_vert.npy',
                        boxes_path=self.data_root / f'{scene}_bbox.npy') for scene in scenes]
        return check_files(entries, listed)

    def load_cloud(self, entry: dict) -> dict:
        rows, boxes = read_array(entry['path'], 6 if self.color else 3), read_array(entry['boxes_path'], 7)
        points = rows[:, :3]
        if self.color:
            points = np.concatenate([points, (rows[:, 3:6] - SCANNET_COLOR) / 256], axis=1)
        labels = labels_of(boxes[:, 6], {number: i for i, number in enumerate(SCANNET)}, entry['boxes_path'])
        boxes = np.concatenate([boxes[:, :6], np.zeros((len(boxes), 1))], axis=1)
        return dict(points=as_cloud(points.astype(np.float32), str(entry['path'])), boxes=boxes, box_labels=labels)

    def _list_of_split(self) -> Path:
        folders = [folder / below for below in ('', 'meta_data') for folder in (self.data_root, self.data_root.parent)]
        names = [f'scannetv2_{self.split}{tail}.txt' for tail in ('', '_subset')]
        for name in names:
            for folder in folders:
                if (folder / name).is_file():
                    return folder / name
        raise FileNotFoundError(f'{self.data_root}: there is no list {names[0]} in {", ".join(map(str, folders))}; '
                                'list_file=… says where it is')


@DATASETS.register_module()
class SUNRGBDDetection(SceneDataset):
    """SUN RGB-D v1 (Song et al. 2015) with turned boxes, as VoteNet prepares it: ``{id}_pc.npz`` (``pc``: rows
    ``x y z r g b``) and ``{id}_bbox.npy`` (rows centre, half sizes, heading, class) in ``{data_root}_{split}``, 10
    classes. Half sizes are doubled; headings run clockwise there, so that ``yaw = −heading``.

    Args:
        data_root: by default ``data/sunrgbd/sunrgbd_pc_bbox_votes_50k_v1``; a folder that holds ``*_v1_{split}``, or
            that one itself, will do, too.
        split: ``'train'`` or ``'val'``.
        color: keep colours as columns 3 to 5, around 0.

    Raises:
        FileNotFoundError, ValueError: as :class:`ScanNetDetection`.
    """

    METAINFO: ClassVar[dict] = dict(classes=SUNRGBD, up_axis='z')
    SPLITS = ('train', 'val')

    def __init__(self, data_root: str | Path | None = None, split: str = 'train', color: bool = False, **kwargs):
        self.color = bool(color)
        super().__init__(data_root or 'data/sunrgbd/sunrgbd_pc_bbox_votes_50k_v1', split, **kwargs)

    def load_data_list(self) -> list[dict]:
        inside = sorted(self.data_root.glob(f'*_v1_{self.split}')) if self.data_root.is_dir() else []
        inside += [self.data_root] if self.data_root.name.endswith(f'_v1_{self.split}') else []
        folder = require_folder(inside[0] if inside else f'{self.data_root}_{self.split}', 'SUNRGBDDetection')
        names = sorted(file.name.removesuffix('_pc.npz') for file in folder.glob('*_pc.npz'))
        if not names:
            raise FileNotFoundError(f'{folder}: there are no scenes in it, files *_pc.npz were expected')
        return check_files([dict(name=name, path=folder / f'{name}_pc.npz', boxes_path=folder / f'{name}_bbox.npy')
                            for name in names], folder)

    def load_cloud(self, entry: dict) -> dict:
        points, boxes = read_array(entry['path'], 6 if self.color else 3, 'pc'), read_array(entry['boxes_path'], 8)
        points = np.concatenate([points[:, :3], points[:, 3:6] - .5], axis=1) if self.color else points[:, :3]
        labels = labels_of(boxes[:, 7], {i: i for i in range(len(SUNRGBD))}, entry['boxes_path'])
        boxes = np.concatenate([boxes[:, :3], 2 * boxes[:, 3:6], -boxes[:, 6:7]], axis=1)
        return dict(points=as_cloud(points.astype(np.float32), str(entry['path'])), boxes=boxes, box_labels=labels)


def check_files(entries: list[dict], listed: Path) -> list[dict]:
    """``entries``, or an error that says how many of their files are missing."""
    files = [entry[key] for entry in entries for key in ('path', 'boxes_path')]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f'{listed}: {len(missing)} of the {len(files)} files of the scenes there do not exist; '
                                f'the first is {missing[0]}')
    return entries


@DATASETS.register_module()
class FolderScenes(SceneDataset):
    """People's own scenes: ``{scene}.{npy,ply,…}`` with ``{scene}.json`` beside it, in the folder itself or in its
    folders ``train``, ``val``, ``test``::

        {"boxes": [{"label": "chair", "center": [0.1, 2.0, 0.4], "size": [0.5, 0.6, 0.9], "yaw": 0.3}]}

    Centres and full sizes are in the unit of the cloud, ``yaw`` in radians counter-clockwise seen from above, 0 where
    it is missing; z is up; an empty list is a scene without boxes. Without folders of splits everything is ``'train'``.

    Args:
        split: ``'train'``, ``'val'``, ``'test'``; ``None`` is everything.
        classes: these in this order; by default the labels in all files of all splits, sorted.
        num_features: columns of a cloud to keep beyond xyz.

    Raises:
        FileNotFoundError: no folder, no split, a cloud without its JSON file or the other way round.
        ValueError, TypeError, KeyError: naming the file: no JSON, an unknown class, a box that lacks something, that is
            not finite or without a size, a scene all of whose boxes lie outside of its points.
    """

    SPLITS = ('train', 'val', 'test', None)

    def __init__(self, data_root: str | Path, split: str | None = 'train', classes: Sequence[str] | None = None,
                 num_features: int = 0, **kwargs):
        root = require_folder(data_root, 'FolderScenes')
        if isinstance(classes, str):
            raise TypeError(f'FolderScenes: classes must be a list of names, got {classes!r}')
        self.num_features = num_features
        self._levels = {name: root / name for name in self.SPLITS[:3] if (root / name).is_dir()} or {'train': root}
        self._scenes = {name: list(scenes_in(folder)) for name, folder in self._levels.items()}
        self._boxes = {file: read_boxes(file) for scenes in self._scenes.values() for _, file in scenes}
        self._wanted = classes
        super().__init__(root, split, **kwargs)

    def load_metainfo(self) -> dict:
        found = sorted({box['label'] for boxes in self._boxes.values() for box in boxes})
        classes = tuple(found if self._wanted is None else self._wanted)
        for file, boxes in self._boxes.items():
            for i, box in enumerate(boxes):
                if box['label'] not in classes:
                    raise ValueError(f'{file}: box {i} is of the class {box["label"]!r}; '
                                     f'{nearest(box["label"], classes)}')
        return dict(classes=classes, up_axis='z')

    def load_data_list(self) -> list[dict]:
        if self.split is not None and self.split not in self._levels:
            raise FileNotFoundError(f'{self.data_root}: has no folder {self.split!r}; there are '
                                    f'{", ".join(self._levels)}')
        classes, entries = self._metainfo['classes'], []
        for name in self._levels if self.split is None else [self.split]:
            for cloud, file in self._scenes[name]:
                rows = [[*box['center'], *box['size'], box.get('yaw', 0.)] for box in self._boxes[file]]
                labels = np.array([classes.index(box['label']) for box in self._boxes[file]], np.int64)
                boxes, labels = check_boxes(np.array(rows, np.float64).reshape(-1, 7), labels, str(file), classes)
                entries.append(dict(name=str(cloud.relative_to(self.data_root)), path=cloud, boxes=boxes,
                                    box_labels=labels, boxes_path=file))
        return entries

    def load_cloud(self, entry: dict) -> dict:
        points, wanted = read_cloud(entry['path']).points, 3 + self.num_features
        if points.shape[1] < wanted:
            raise ValueError(f'{entry["path"]}: {wanted} columns are wanted (xyz and num_features='
                             f'{self.num_features}), it has {points.shape[1]}')
        boxes = entry['boxes']
        reach = np.linalg.norm(boxes[:, 3:6], axis=1, keepdims=True) / 2
        near = (boxes[:, :3] + reach >= points[:, :3].min(0)) & (boxes[:, :3] - reach <= points[:, :3].max(0))
        if len(boxes) and not near.all(1).any():
            raise ValueError(f'{entry["boxes_path"]}: all boxes lie outside of the points of {entry["path"].name}; '
                             'both must be in one frame, and not further from its origin than 1000 times their extent')
        return dict(points=points[:, :wanted])


def scenes_in(folder: Path) -> Iterator[tuple[Path, Path]]:
    """The clouds in a folder and their JSON files, sorted."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith('.'))
    clouds = [file for file in files if file.suffix.lower() in EXTENSIONS]
    names = {cloud.stem for cloud in clouds}
    for file in files:
        if file.suffix.lower() == '.json' and file.stem not in names:
            raise FileNotFoundError(f'{file}: there is no cloud {file.stem}.* beside it')
    for first, second in pairwise(clouds):
        if first.stem == second.stem:
            raise ValueError(f'{first} and {second.name} are two clouds of one scene')
    for cloud in clouds:
        if not cloud.with_suffix('.json').is_file():
            raise FileNotFoundError(f'{cloud}: there is no {cloud.stem}.json beside it; a scene without boxes has one '
                                    'with {"boxes": []}')
        yield cloud, cloud.with_suffix('.json')


def read_boxes(file: Path) -> list[dict]:
    """The boxes in a JSON file, with everything where it should be; values are checked later."""
    try:
        content = json.loads(file.read_text('utf-8-sig'), parse_int=float)  # any digits: inf beyond the range
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{file}: is no JSON: {error}') from error
    boxes = content.get('boxes') if isinstance(content, dict) else None
    if not isinstance(boxes, list):
        raise ValueError(f'{file}: should hold {{"boxes": [...]}}, got {str(content)[:80]}')
    for i, box in enumerate(boxes):
        if not isinstance(box, dict) or not isinstance(box.get('label'), str):
            raise ValueError(f'{file}: box {i} should be an object with a "label", got {str(box)[:80]}')
        for key in box:
            if key not in ('label', 'center', 'size', 'yaw'):
                raise KeyError(f'{file}: box {i} has {key!r}; {nearest(key, ("label", "center", "size", "yaw"))}')
        for key, values in (('center', box.get('center')), ('size', box.get('size')), ('yaw', [box.get('yaw', 0)] * 3)):
            if not isinstance(values, list) or len(values) != 3 or not all(map(is_number, values)):
                raise ValueError(f'{file}: {key!r} of box {i} should be '
                                 f'{"a number" if key == "yaw" else "three numbers"}, got {box.get(key)!r}')
    return boxes
