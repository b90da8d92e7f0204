"""ShapeNet-55: what Point-BERT and Point-MAE pretrain on."""
import os
import re
from collections import Counter
from pathlib import Path
from typing import ClassVar

from ewa3d.datasets.base import PointDataset, require_folder
from ewa3d.datasets.modelnet import read_lines
from ewa3d.registry import DATASETS, nearest

__all__ = ['ShapeNet55']

DEFAULT_ROOT = 'data/ShapeNet55-34'
# WordNet's numbers of the classes, which the files begin with; the label is the place in this order.
SYNSETS = {
    '02691156': 'airplane', '02747177': 'trash_bin', '02773838': 'bag', '02801938': 'basket', '02808440': 'bathtub',
    '02818832': 'bed', '02828884': 'bench', '02843684': 'birdhouse', '02871439': 'bookshelf', '02876657': 'bottle',
    '02880940': 'bowl', '02924116': 'bus', '02933112': 'cabinet', '02942699': 'camera', '02946921': 'can',
    '02954340': 'cap', '02958343': 'car', '02992529': 'cellphone', '03001627': 'chair', '03046257': 'clock',
    '03085013': 'keyboard', '03207941': 'dishwasher', '03211117': 'display', '03261776': 'earphone',
    '03325088': 'faucet', '03337140': 'file_cabinet', '03467517': 'guitar', '03513137': 'helmet', '03593526': 'jar',
    '03624134': 'knife', '03636649': 'lamp', '03642806': 'laptop', '03691459': 'loudspeaker', '03710193': 'mailbox',
    '03759954': 'microphone', '03761084': 'microwave', '03790512': 'motorbike', '03797390': 'mug',
    '03928116': 'piano', '03938244': 'pillow', '03948459': 'pistol', '03991062': 'flowerpot', '04004475': 'printer',
    '04074963': 'remote_control', '04090263': 'rifle', '04099429': 'rocket', '04225987': 'skateboard',
    '04256520': 'sofa', '04330267': 'stove', '04379243': 'table', '04401088': 'telephone', '04460130': 'tower',
    '04468005': 'train', '04530566': 'watercraft', '04554684': 'washing_machine'}
NAME = re.compile(r'(\d{8})-[\w-]*\.npy', re.ASCII)  # a file beside the others: nothing that leads to another folder


@DATASETS.register_module()
class ShapeNet55(PointDataset):
    """ShapeNet-55: 41,952 training and 10,518 test shapes of 55 classes, 8,192 points each; y is up.

    The official lists are read beside the data: ``shapenet_pc/{taxonomy}-{model}.npy`` and ``ShapeNet-55/train.txt``,
    ``test.txt``. Clouds are read from their files one by one: a file holds nothing but its points, and is in no order.

    Args:
        data_root: the folder that holds ``shapenet_pc``, or that folder itself; by default ``data/ShapeNet55-34``.
        split: ``'train'`` or ``'test'``.
        whole: train on both lists, as Point-BERT's pretraining does.
        list_dir: the folder of the two lists; by default ``ShapeNet-55`` in ``data_root`` or beside it, or
            ``data_root``.

    Raises:
        FileNotFoundError: a list, or clouds that it names (how many, and the first), are not there.
        ValueError: a line of a list that is no ``{taxonomy}-{model}.npy``, such as a path, or stands there twice.
    """

    METAINFO: ClassVar[dict] = dict(classes=tuple(SYNSETS.values()), up_axis='y')
    SPLITS = ('train', 'test')

    def __init__(self, data_root: str | Path | None = None, split: str = 'train', whole: bool = False,
                 list_dir: str | Path | None = None, **kwargs):
        if whole and split != 'train':
            raise ValueError(f"ShapeNet55: whole=True trains on both lists: split must be 'train', got {split!r}")
        self.whole = bool(whole)
        self.list_dir = None if list_dir is None else require_folder(list_dir, 'ShapeNet55: list_dir')
        super().__init__(require_folder(data_root or DEFAULT_ROOT, 'ShapeNet55'), split, **kwargs)

    def load_data_list(self) -> list[dict]:
        folder = self.data_root / 'shapenet_pc'
        folder = folder if folder.is_dir() else self.data_root
        there = {entry.name for entry in os.scandir(folder)}  # quicker than to ask for 41,952 files
        labels = {synset: label for label, synset in enumerate(SYNSETS)}
        data_list = []
        for split in ('train', 'test') if self.whole else (self.split,):
            listed = self._list_of(split)
            names = read_lines(listed)
            if not names:
                raise ValueError(f'{listed}: the list is empty')
            missing = [name for name in names if name not in there]
            data_list += [dict(path=str(folder / name), name=name.removesuffix('.npy'),
                               label=labels[taxonomy_of(name, listed)]) for name in names]
            if missing:
                raise FileNotFoundError(f'{listed} lists {len(names)} clouds, {len(missing)} of them are not there; '
                                        f'the first is {folder / missing[0]}')
        twice = [name for name, count in Counter(entry['name'] for entry in data_list).items() if count > 1]
        if twice:
            raise ValueError(f'{self._what}: {len(twice)} of the clouds of train.txt are in test.txt as well, the '
                             f'first is {twice[0]}')
        return data_list

    def _list_of(self, split: str) -> Path:
        folders = [self.list_dir] if self.list_dir is not None else [
            self.data_root / 'ShapeNet-55', self.data_root, self.data_root.parent / 'ShapeNet-55']
        for folder in folders:
            if (folder / f'{split}.txt').is_file():
                return folder / f'{split}.txt'
        raise FileNotFoundError(f'ShapeNet55: there is no list {split}.txt in {" or ".join(map(str, folders))}; '
                                f'data/README.md says where to get it, list_dir=… where it is')


def taxonomy_of(name: str, listed: Path) -> str:
    """The class number that a line of a list begins with."""
    match = NAME.fullmatch(name)
    if match is None:
        raise ValueError(f'{listed}: the line {name[:100]!r} is no name of a cloud, {{taxonomy}}-{{model}}.npy without '
                         f'a folder')
    if match[1] not in SYNSETS:
        raise ValueError(f'{listed}: {name[:100]!r} is of no class of ShapeNet-55; {nearest(match[1], SYNSETS)}')
    return match[1]
