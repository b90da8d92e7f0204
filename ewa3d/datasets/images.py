"""Images with labels: CIFAR, folders, ImageNet, and the digits that scikit-learn brings along."""
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from ewa3d.checks import some
from ewa3d.datasets.base import DATA_ERRORS, PointDataset, require_folder
from ewa3d.datasets.folder import Tree, listed, subfolders, wanted_classes
from ewa3d.datasets.pickles import read_numpy_pickle
from ewa3d.registry import DATASETS, nearest

__all__ = ['CIFAR10', 'CIFAR100', 'Digits', 'ImageDataset', 'ImageFolder', 'ImageNet', 'decode_image']

EXTENSIONS = frozenset(('.jpg', '.jpeg', '.png', '.bmp', '.gif', '.webp', '.tif', '.tiff', '.ppm', '.pgm'))
MOST_PIXELS = 89_478_485  # 256 MB; Pillow warns of more and refuses twice as many, a few bytes may announce them
CHECK_SIZE = (64, 64)  # a JPEG is decoded at a fraction of its size, but to its end


def decode_image(path: str | Path, mode: str = 'RGB', size: tuple[int, int] | None = None) -> np.ndarray:
    """The image in a file, ``(H, W, C)`` uint8.

    Args:
        mode: ``'RGB'``, or ``'L'`` for one channel.
        size: where given, formats that can are decoded at any smaller size that is at least this: quicker.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it does not decode.
    """
    from PIL import Image
    if not Path(path).is_file():
        raise FileNotFoundError(f'{path}: there is no such file')
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f'{image.width} × {image.height} pixels, more than {MOST_PIXELS}')
            if size is not None:
                image.draft(mode, size)
            if image.mode in ('I', 'F'):
                raise ValueError('numbers of 32 bits, whose range nothing says')
            if image.mode.startswith('I;16'):  # convert() would clip to 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            array = np.asarray(image.convert(mode))
    except Exception as error:  # damaged bytes can make a decoder fail in any way
        raise ValueError(f'{path}: the image does not decode ({type(error).__name__}: {error})') from error
    return array[..., None] if array.ndim == 2 else array


class ImageDataset(PointDataset):
    """What data sets of images share. All of ``PointDataset`` holds but what a sample starts with:
    ``dict(img (H, W, C) uint8, label, name, index, rng)``.

    ``load_data_list`` gives ``img`` (an array) or ``path`` (a file) and ``label``.

    Args:
        mode: ``'RGB'``, or ``'L'`` for one channel; of files.

    Raises:
        ValueError: another mode, a file that does not decode; and as ``PointDataset``.
    """
    UNREADABLE = 'images do not decode'

    def __init__(self, data_root: str | Path | None = None, split: str | None = 'train', mode: str = 'RGB', **kwargs):
        if mode not in ('RGB', 'L'):
            raise ValueError(f"{type(self).__name__}: mode must be 'RGB' or 'L', got {mode!r}")
        self.mode = mode
        super().__init__(data_root, split, **kwargs)

    def load_image(self, entry: dict) -> dict:
        """What an entry of the data list stands for: ``img`` ``(H, W, C)``."""
        if 'img' in entry:
            return {}
        if 'path' in entry:
            return dict(img=decode_image(entry['path'], self.mode))
        raise KeyError(f"an entry of the data list needs 'img' or 'path', got {sorted(entry)}")

    def _failure(self, index: int) -> str:
        path = self._data_list[index].get('path')
        if path is None:
            return super()._failure(index)
        try:
            decode_image(path, self.mode, CHECK_SIZE)
        except DATA_ERRORS as error:
            return str(error)
        return ''

    def _start(self, index: int) -> dict:
        entry, name = self._data_list[index], self._name(index)
        results = {**self._defaults(index), **entry, **self.load_image(entry)}
        img = check_image(results['img'], name).view()
        img.flags.writeable = False  # a transform that writes in place would change the data for good
        results.update(img=img, name=name)
        return results

    def _defaults(self, index: int) -> dict:
        defaults = super()._defaults(index)
        return dict(index=index, rng=defaults['rng'])


def check_image(img, name: str) -> np.ndarray:
    """``img``, if it is an array ``(H, W, C)`` of bytes."""
    if not isinstance(img, np.ndarray) or img.dtype != np.uint8 or img.ndim != 3 or 0 in img.shape:
        what = f'{img.dtype} {img.shape}' if isinstance(img, np.ndarray) else type(img).__name__
        raise ValueError(f'{name}: an image is a uint8 array (H, W, C), got {what}')
    return img


# ---------------------------------------------------------------------------------------------------------------------
# CIFAR
# ---------------------------------------------------------------------------------------------------------------------
@DATASETS.register_module()
class CIFAR10(ImageDataset):
    """CIFAR-10 in its official Python batches (Krizhevsky 2009): 32 × 32, ten classes.

    The pickles are read without executing anything in them, and their checksums are not looked at: a part of the data
    in the same files is as good.

    Args:
        data_root: the folder of the batches, or the one that holds it.
        split: ``'train'`` or ``'test'``.

    Raises:
        FileNotFoundError: no such folder, or a batch is missing. ValueError: a file that is no batch.
    """
    SPLITS = ('train', 'test')
    FOLDER = 'cifar-10-batches-py'
    FILES: ClassVar[dict] = dict(train=tuple(f'data_batch_{i}' for i in range(1, 6)), test=('test_batch',))
    META = ('batches.meta', 'label_names')
    LABELS = 'labels'

    def __init__(self, data_root: str | Path = 'data', split: str = 'train', **kwargs):
        root = require_folder(data_root, type(self).__name__)
        super().__init__(root / self.FOLDER if (root / self.FOLDER).is_dir() else root, split, **kwargs)

    def load_metainfo(self) -> dict:
        file, key = self.META
        names = self._content(file, key)[0]
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, (str, bytes)) for name in names):
            raise ValueError(f'{self.data_root / file}: {key} must be a list of names, it is a {type(names).__name__}')
        classes = tuple(map(_text, names))
        if len({*classes}) < len(classes) or not classes:
            raise ValueError(f'{self.data_root / file}: {key} must be names that differ, got {some(classes, 10)}')
        return dict(classes=classes)

    def load_data_list(self) -> list[dict]:
        entries = []
        for file in self.FILES[self.split]:
            pixels, labels = self._content(file, 'data', self.LABELS)
            if not isinstance(labels, (list, tuple)) and getattr(labels, 'ndim', 0) != 1:
                raise ValueError(f'{self.data_root / file}: {self.LABELS} must be a list of numbers, it is a '
                                 f'{type(labels).__name__}')
            if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
                raise ValueError(f'{self.data_root / file}: data must be uint8 ({len(labels)}, 3072), one row a label; '
                                 f'got {getattr(pixels, "dtype", type(pixels).__name__)} '
                                 f'{getattr(pixels, "shape", "")}')
            images = np.ascontiguousarray(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            entries += [dict(img=img, label=label, name=f'{file}[{row}]')
                        for row, (img, label) in enumerate(zip(images, labels))]
        return entries

    def _content(self, file: str, *keys: str) -> list:
        path = self.data_root / file
        if not path.is_file():
            raise FileNotFoundError(f'{path}: there is no such file; {type(self).__name__} expects '
                                    f'{", ".join((self.META[0], *self.FILES[self.split]))} there')
        content = read_numpy_pickle(path)
        if not isinstance(content, dict):
            raise ValueError(f'{path}: a dict was expected of a file of {type(self).__name__}, it holds a '
                             f'{type(content).__name__}')
        content = {_text(key): value for key, value in content.items()}
        for key in keys:
            if key not in content:
                raise ValueError(f'{path}: no {key!r} in it, so it is no file of {type(self).__name__}; '
                                 f'{nearest(key, content)}')
        return [content[key] for key in keys]


def _text(value) -> str:
    """A name in a batch: bytes where somebody wrote the file anew with what ``encoding='bytes'`` gave."""
    return value.decode('latin1') if isinstance(value, bytes) else str(value)


@DATASETS.register_module()
class CIFAR100(CIFAR10):
    """CIFAR-100 in its official Python batches; see :class:`CIFAR10`.

    Args:
        coarse: the 20 superclasses instead of the 100 classes.
    """
    FOLDER = 'cifar-100-python'
    FILES: ClassVar[dict] = dict(train=('train',), test=('test',))

    def __init__(self, data_root: str | Path = 'data', split: str = 'train', coarse: bool = False, **kwargs):
        self.META = ('meta', 'coarse_label_names' if coarse else 'fine_label_names')
        self.LABELS = 'coarse_labels' if coarse else 'fine_labels'
        super().__init__(data_root, split, **kwargs)


@DATASETS.register_module()
class Digits(ImageDataset):
    """The handwritten digits that are part of scikit-learn: 1,797 real images of 8 × 8 pixels, nothing to download.

    They are the test part of the UCI set "Optical Recognition of Handwritten Digits". The first 1,197 are the training
    split, the last 600 the test split. (They come writer by writer, so that a random split would have the same hands
    in both parts.)
    """
    METAINFO: ClassVar[dict] = dict(classes=tuple(map(str, range(10))))
    SPLITS = ('train', 'test')
    NUM_TRAIN = 1197

    def load_data_list(self) -> list[dict]:
        from sklearn.datasets import load_digits
        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1); 0 to 16 there
        rows = range(len(images))
        rows = rows[:self.NUM_TRAIN] if self.split == 'train' else rows[self.NUM_TRAIN:]
        return [dict(img=images[i], label=int(digits.target[i]), name=f'digit {i}') for i in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------
@DATASETS.register_module()
class ImageFolder(ImageDataset):
    """``class_name/*.{jpg,png,…}``, with optional levels ``train``, ``val``, ``test`` above or below the classes.

    Classes are the names of the folders, sorted, the same for every split. Hidden files are ignored.

    Args:
        split: without levels everything is ``'train'``; ``None`` is everything, whatever the levels.
        classes: these classes in this order, instead of those that the folders name.

    Raises:
        FileNotFoundError: there is no folder.
        ValueError: no classes, an empty class folder, a file that is no image (named when it is read).
    """
    SPLITS = ('train', 'val', 'test', None)

    def __init__(self, data_root: str | Path, split: str | None = 'train', classes: Sequence[str] | None = None,
                 **kwargs):
        if data_root is None:
            raise ValueError(f'{type(self).__name__} needs data_root: the folder with the classes')
        self._wanted_classes = None if classes is None else tuple(classes)
        self._find(require_folder(data_root, type(self).__name__), split)
        super().__init__(data_root, split, **kwargs)

    def _find(self, root: Path, split: str | None) -> None:
        self._tree = Tree(root)

    def _all_classes(self) -> list[str]:
        return self._tree.classes

    def _folders(self, name: str) -> list[Path]:
        return self._tree.folders(name, self.split)

    def load_metainfo(self) -> dict:
        return dict(classes=wanted_classes(self.data_root, self._all_classes(), self._wanted_classes))

    def load_data_list(self) -> list[dict]:
        entries = [dict(path=file, label=label, name=str(file.relative_to(self.data_root)))
                   for label, name in enumerate(self._metainfo['classes'])
                   for folder in self._folders(name) for file in images_in(folder)]
        return entries


def images_in(folder: Path) -> list[Path]:
    """The images in a class folder, sorted; ``ValueError`` where there is none."""
    present = [Path(entry.path) for entry in listed(folder)]
    files = [f for f in present if f.suffix.lower() in EXTENSIONS]
    if not files:
        seen = dict(Counter(f.suffix for f in present))
        raise ValueError(f'{folder}: an empty class folder; images {", ".join(sorted(EXTENSIONS))} were expected, '
                         f'there are {seen or "none"}')
    return files


@DATASETS.register_module()
class ImageNet(ImageFolder):
    """ImageNet's folder layout: ``{train,val}/n01440764/*.JPEG``. Other folders beside the two are ignored.

    Classes are the WordNet numbers of the training split, sorted: the order that published weights have. A part of
    the classes is as good.

    Raises:
        FileNotFoundError: there is no folder ``train`` or ``val``.
        ValueError: a split without class folders (the validation images come in one folder and have to be sorted).
    """
    SPLITS = ('train', 'val')

    def _find(self, root: Path, split: str | None) -> None:
        self._levels = {level: [f for f in subfolders(root / level) if f.name[:1] == 'n' and f.name[1:].isdigit()]
                        for level in self.SPLITS if (root / level).is_dir()}
        if split in self.SPLITS and split not in self._levels:
            raise FileNotFoundError(f'{root}: has no folder {split!r}; {{train,val}}/n01440764/… was expected')
        if split in self._levels and not self._levels[split]:
            raise ValueError(f'{root / split}: has no class folders such as n01440764; where the images lie in one '
                             f'folder, sort them into one folder a class')

    def _all_classes(self) -> list[str]:
        level = 'train' if self._levels.get('train') else self.split
        return [folder.name for folder in self._levels[level]]

    def _folders(self, name: str) -> list[Path]:
        return [folder for folder in self._levels[self.split] if folder.name == name]
