"""ScanObjectNN: objects cut out of indoor scans."""
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from ewa3d.datasets.base import PointDataset, require_folder
from ewa3d.datasets.cache import cached_clouds
from ewa3d.datasets.h5 import read_data, read_labels
from ewa3d.datasets.io import as_cloud, open_h5
from ewa3d.registry import DATASETS, nearest

__all__ = ['ScanObjectNN']

DEFAULT_ROOT = 'data/ScanObjectNN'
VARIANTS = {  # variant: folder, end of the file's name
    'objbg': ('main_split', 'objectdataset.h5'),
    'objonly': ('main_split_nobg', 'objectdataset.h5'),
    'hardest': ('main_split', 'objectdataset_augmentedrot_scale75.h5')}
BEGINNINGS = {'train': 'training', 'test': 'test'}
BACKGROUND = ('mark', 'drop')
MAX_POINTS = 8192  # four times what a cloud has: all of it is kept


@DATASETS.register_module()
class ScanObjectNN(PointDataset):
    """ScanObjectNN (Uy et al., ICCV 2019): real scans, 15 classes, 2,048 points a cloud; y is up.

    The official h5 files hold ``data``, ``label`` and ``mask``. As in the published code of Point-BERT and Point-MAE,
    nothing is normalised here; a pipeline may do so. The first use orders the clouds by farthest point sampling and
    keeps the result under ``cache_dir``.

    Args:
        data_root: the folder that holds ``main_split`` and ``main_split_nobg``, or its parent where that is called
            ``h5_files``; by default ``data/ScanObjectNN``.
        variant: ``'objbg'`` objects with what is around them (OBJ_BG), ``'objonly'`` objects alone (OBJ_ONLY),
            ``'hardest'`` shifted, turned and scaled boxes (PB_T50_RS).
        split: ``'train'`` or ``'test'``.
        background: ``'mark'`` gives every point a part, 1 for the object and 0 for the background, where the file has a
            ``mask``; ``'drop'`` leaves the background out, so that clouds differ in size.
        metainfo: ``dict(up_axis='z')`` for files of this layout that are turned another way.

    Raises:
        FileNotFoundError, ValueError: a file is missing, cut off or lacks a key, or arrays and labels are not what
            they should be; the message names the file.
    """

    METAINFO: ClassVar[dict] = dict(
        classes=('bag', 'bin', 'box', 'cabinet', 'chair', 'desk', 'display', 'door', 'shelf', 'table', 'bed', 'pillow',
                 'sink', 'sofa', 'toilet'), up_axis='y', part_names=('background', 'object'))
    SPLITS = ('train', 'test')

    def __init__(self, data_root: str | Path | None = None, variant: str = 'hardest', split: str = 'train',
                 background: str = 'mark', **kwargs):
        if variant not in VARIANTS:
            raise ValueError(f'ScanObjectNN: there is no variant {variant!r}; {nearest(variant, VARIANTS)}')
        if background not in BACKGROUND:
            raise ValueError(f"ScanObjectNN: background must be 'mark' or 'drop', got {background!r}")
        self.variant, self.background = variant, background
        super().__init__(require_folder(data_root or DEFAULT_ROOT, 'ScanObjectNN'), split, **kwargs)

    def load_data_list(self) -> list[dict]:
        file = self._file()
        labels = read_labels(file, len(self.METAINFO['classes']))
        if not labels:
            raise ValueError(f'{file}: holds no clouds')
        settings = self._cache_settings(background=self.background)
        self._clouds = cached_clouds(self.cache_dir, f'scanobjectnn_{self.variant}_{self.split}', settings, [file],
                                     self.data_root, lambda: self._read(file), len(labels), MAX_POINTS)
        return [dict(name=f'{file.name}[{row}]', label=label, row=row, fps_ordered=True)
                for row, label in enumerate(labels)]

    def load_cloud(self, entry: dict) -> dict:
        cloud = self._clouds[entry['row']]
        if cloud.shape[1] == 3:
            return dict(points=cloud)
        return dict(points=cloud[:, :3], parts=cloud[:, 3].astype(np.uint8))

    def _file(self) -> Path:
        folder, ending = VARIANTS[self.variant]
        name = f'{BEGINNINGS[self.split]}_{ending}'
        for root in (self.data_root, self.data_root / 'h5_files'):
            if (root / folder / name).is_file():
                return root / folder / name
        raise FileNotFoundError(f'ScanObjectNN, variant {self.variant!r}: there is no '
                                f'{self.data_root / folder / name}; data/README.md says where to get the files')

    def _read(self, file: Path) -> Iterator[np.ndarray]:
        """The clouds with a fourth column, 1 for the object and 0 for the background, where it is to be kept."""
        with open_h5(file) as content:
            masked = 'mask' in list(content)
        if not masked and self.background == 'drop':
            raise ValueError(f"{file}: has no key 'mask', which background='drop' needs")
        data, *mask = read_data(file, *(['mask'] if masked else []))
        if masked and (mask[0].size != data.shape[0] * data.shape[1] or mask[0].dtype.kind not in 'fiu'):
            raise ValueError(f"{file}: 'mask' should hold one number a point, got {mask[0].dtype} of the shape "
                             f'{mask[0].shape}')
        clouds = ((cloud, mask[0][i] if masked else None, f'{file}[{i}]') for i, cloud in enumerate(data))
        yield from self._read_each(self._cloud, clouds, 4 if masked and self.background != 'drop' else 3)

    def _cloud(self, cloud: np.ndarray, mask: np.ndarray | None, name: str) -> np.ndarray:
        cloud = as_cloud(cloud[:, :3], name)
        if mask is None:
            return cloud
        is_object = mask.reshape(-1) != -1  # other values are parts of the object
        if self.background != 'drop':
            return np.concatenate([cloud, is_object[:, None].astype(np.float32)], axis=1)
        if not is_object.any():
            raise ValueError(f'{name}: all points are background')
        return cloud[is_object]
