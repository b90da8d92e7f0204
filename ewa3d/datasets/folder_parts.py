"""``FolderParts``: people's own clouds with a part for every point."""
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from ewa3d.datasets.folder import FolderPointCloud
from ewa3d.datasets.io import Cloud
from ewa3d.datasets.parts import as_integers, read_json
from ewa3d.registry import DATASETS, nearest

__all__ = ['FolderParts', 'read_parts']


@DATASETS.register_module()
class FolderParts(FolderPointCloud):
    """Own clouds with a part for every point, in folders as :class:`FolderPointCloud` has them: one for each category,
    of which there may be one alone. ``parts.json`` beside the categories names their parts::

        {"mug": ["body", "handle"], "chair": ["seat", "back", "leg"]}

    The part of a point is its place in that list, counted from 0: the last column of a file, or, where a file
    ``NAME.seg`` lies beside the cloud ``NAME.ply``, the number in the row of that file.

    Entries have ``parts`` ``(N,)``, counted through all categories in their order, and ``label``, the category.
    Metainfo: ``classes``, ``parts`` (category → part numbers) and ``part_names``.

    Args:
        parts: these instead of those in ``parts.json``.
        **kwargs: as :class:`FolderPointCloud`. ``num_features`` are columns between xyz and the part.

    Raises:
        FileNotFoundError: there is neither ``parts.json`` nor ``parts``.
        KeyError: a category has no parts there.
        ValueError, TypeError: naming the file: no JSON of this form, parts and points of different number, a label that
            is no integer or none of the category's.
    """

    LEAST_CLASSES = 1

    def __init__(self, data_root: str | Path, split: str | None = 'train',
                 parts: Mapping[str, Sequence[str]] | None = None, **kwargs):
        self._given = parts
        super().__init__(data_root, split, **kwargs)

    def load_metainfo(self) -> dict:
        metainfo = super().load_metainfo()
        known = read_parts(self.data_root / 'parts.json', self._given)
        for name in metainfo['classes']:
            if name not in known:
                raise KeyError(f'{self.data_root}: the category {name!r} has no parts in '
                               f'{"parts.json" if self._given is None else "parts"}; {nearest(name, known)}')
        self._names = {name: known[name] for name in metainfo['classes']}
        first = np.cumsum([0, *map(len, self._names.values())]).tolist()
        parts = {name: tuple(range(low, high)) for name, (low, high) in zip(self._names, pairwise(first))}
        return dict(metainfo, parts=parts, part_names=tuple(
            f'{name}/{part}' for name, names in self._names.items() for part in names))

    def load_cloud(self, entry: dict) -> dict:
        found = super().load_cloud(entry)
        return dict(found, points=found['points'][:, :-1], parts=found['points'][:, -1].astype(np.int64))

    def _settings(self) -> dict:
        return dict(super()._settings(), parts={name: len(names) for name, names in self._names.items()})

    def _sources(self, files: list[Path]) -> list[Path]:
        return [source for file in files for source in (file, file.with_suffix('.seg')) if source.is_file()]

    @property
    def _columns(self) -> int:
        return super()._columns + 1

    def _read_file(self, file: Path) -> np.ndarray:
        cloud, labels = self._split(file, self._read_all_columns(file))
        category = next(part for part in file.relative_to(self.data_root).parts if part in self._names)
        names, first = self._names[category], self._metainfo['parts'][category][0]
        wrong = np.flatnonzero((labels < 0) | (labels >= len(names)))
        if len(wrong):
            raise ValueError(f'{file}: point {wrong[0]} has the part {labels[wrong[0]]}; {category!r} has the parts 0 '
                             f'to {len(names) - 1}: {", ".join(names)}')
        return np.concatenate([self._wanted_columns(file, cloud), (first + labels)[:, None].astype(np.float32)], axis=1)

    def _split(self, file: Path, cloud: Cloud) -> tuple[Cloud, np.ndarray]:
        """The cloud without its parts, and these."""
        beside = file.with_suffix('.seg')
        if not beside.is_file():
            if cloud.normals or cloud.points.shape[1] < 4:
                raise ValueError(f'{file}: has no column with the parts, and there is no {beside.name} beside it')
            return Cloud(cloud.points[:, :-1], cloud.normals), as_integers(cloud.points[:, -1], file)
        try:
            numbers = np.array(beside.read_text('utf-8-sig', errors='replace').split(), np.float64)
        except ValueError as error:
            raise ValueError(f'{beside}: a number a row was expected: {error}') from error
        if len(numbers) != len(cloud.points):
            raise ValueError(f'{beside}: {len(numbers)} parts for the {len(cloud.points)} points of {file.name}')
        return cloud, as_integers(numbers, beside)


def read_parts(file: Path, given: Mapping[str, Sequence[str]] | None = None) -> dict[str, tuple[str, ...]]:
    """Category → names of its parts, of ``file`` or as ``given``.

    Raises:
        FileNotFoundError: nothing is given and there is no file; says what it should hold.
        ValueError: naming the file: something else than lists of different names.
    """
    if given is None and not file.is_file():
        raise FileNotFoundError(f'{file}: there is no such file; it names the parts of each category: '
                                '{"mug": ["body", "handle"]}')
    where, found = (file, read_json(file)) if given is None else ('parts', given)
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f'{where}: category → list of names was expected, got {str(found)[:80]}')
    for name, parts in found.items():
        if not isinstance(parts, (list, tuple)) or not parts or not all(isinstance(part, str) for part in parts) \
                or len(set(parts)) < len(parts):
            raise ValueError(f'{where}: the parts of {name!r} should be a list of different names, got '
                             f'{str(parts)[:80]}')
    return {name: tuple(parts) for name, parts in found.items()}
