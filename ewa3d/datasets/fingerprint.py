"""What data a run saw, in a few numbers: equal on another machine and in another folder, different for other data.

A fingerprint is made of the samples' names and labels (hashes, in no order) and of what a few of them hold before the
pipeline (sizes, means, standard deviations; compared with a tolerance, for decoders and processors differ in their last
digits).
"""
import hashlib
import os
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ewa3d.checks import is_number, some
from ewa3d.datasets.base import DATA_ERRORS, PointDataset

__all__ = ['differences', 'fingerprint', 'same_split']

SAMPLES = 8  # whose content is looked at: first, last and evenly between, by name
COLUMNS = 16  # an array of more is taken as a whole
TOLERANCE = 1e-3
ENDS = 1 << 16  # bytes at the beginning and at the end of a file that is not decoded here


def fingerprint(dataset) -> dict:
    """The fingerprint of a data set, as JSON-able data. Reads a few samples; modification times, folders and the order
    of the samples are nothing to it.

    Returns:
        ``type``, ``split``, ``samples``; of this package's data sets ``names`` and ``labels`` (hashes) and ``content``
        (name → what → numbers); of data sets of others ``parts``, in their order.
    """
    found = dict(type=type(dataset).__name__, split=getattr(dataset, 'split', None), samples=len(dataset))
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if classes is not None:
        found['classes'] = _hash(map(str, classes))
    if isinstance(dataset, PointDataset):
        return {**found, **_of_samples(dataset)}
    inner = getattr(dataset, 'dataset', None)
    parts = [*([inner] if inner is not None else []), *(getattr(dataset, 'datasets', None) or ())]
    return {**found, 'parts': [fingerprint(part) for part in parts]} if parts else found


def _of_samples(dataset: PointDataset) -> dict:
    names = [_plain(dataset.name_of(i), dataset.data_root) for i in range(len(dataset))]
    order = sorted(range(len(names)), key=names.__getitem__)
    labels = dataset.labels
    last = len(order) - 1
    chosen = [order[place] for place in sorted({round(last * i / (SAMPLES - 1)) for i in range(SAMPLES)})]
    return dict(names=_hash(names[i] for i in order), labels=_hash(f'{names[i]}\0{labels[i]}' for i in order),
                content={names[i]: _content(dataset, i) for i in chosen})


def _plain(name: str, root: Path | None) -> str:
    """A name without the folder of the data, and the same on every system."""
    if root is not None and name.startswith(str(root)):
        name = os.path.relpath(name, root)
    return unicodedata.normalize('NFC', name.replace('\\', '/'))


def _hash(texts: Iterable[str]) -> str:
    sha = hashlib.sha256()
    for text in texts:
        raw = text.encode('utf-8', 'surrogateescape')
        sha.update(b'%d:' % len(raw) + raw)
    return sha.hexdigest()[:16]


def _content(dataset: PointDataset, i: int) -> dict:
    """What → numbers, or a hash."""
    try:
        sample = dataset.raw(i)
        found = {key: _numbers(np.asarray(value)) for key, value in sample.items()
                 if isinstance(value, np.ndarray) and value.dtype.kind in 'fiub'}
        if not found and 'path' in sample:  # read by the pipeline
            found['path'] = _of_file(Path(sample['path']))
    except (*DATA_ERRORS, KeyError):
        return dict(error='cannot be read')
    return found


def _numbers(array: np.ndarray) -> list:
    """``[shape, [mean and standard deviation of each column]]``."""
    by_column = array.ndim == 2 and array.shape[1] <= COLUMNS
    columns = array.reshape(-1, array.shape[1] if by_column else 1)
    if not columns.size:
        return [list(array.shape), []]
    with np.errstate(all='ignore'):
        values = [*columns.mean(0, dtype=np.float64), *columns.std(0, dtype=np.float64)]
    return [list(array.shape), [float(f'{value:.6g}') if np.isfinite(value) else str(value) for value in values]]


def _of_file(path: Path) -> str:
    """Size and a hash of both ends of a file; of a folder, how many files it has, and of the first of them."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if not f.name.startswith('.'))
        return f'{len(files)} files, {_of_file(files[0])}' if files else 'no files'
    with path.open('rb') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        ends = file.read(ENDS)
        file.seek(max(0, size - ENDS))
        return f'{size} bytes, {hashlib.sha256(ends + file.read(ENDS)).hexdigest()[:16]}'


# ---- comparing ------------------------------------------------------------------------------------------------------
def same_split(one: Mapping, other: Mapping) -> bool:
    """Whether two fingerprints are of the same split of the same kind of data set."""
    return all(one.get(key) == other.get(key) for key in ('type', 'split'))


def differences(then: Mapping, now: Mapping) -> list[str]:
    """What differs between two fingerprints, in words; nothing where they are of the same data. What was read from a
    file may be anything."""
    found = [f'{key}: {then.get(key)} then, {now.get(key)} now' for key in ('type', 'split', 'samples')
             if then.get(key) != now.get(key)]
    words = dict(classes='the classes', names='the names of the samples',
                 labels='the labels' if then.get('names') == now.get('names') else '')
    found += [f'{what} (hash {then[key]} then, {now[key]} now)' for key, what in words.items()
              if what and key in then and key in now and then[key] != now[key]]
    one, other = _contents(then), _contents(now)
    changed = [(name, key) for name in one if name in other for key in sorted({*one[name], *other[name]}, key=str)
               if not _alike(one[name].get(key), other[name].get(key))]
    if changed:
        name, key = changed[0]
        among = some(dict.fromkeys(name for name, _ in changed), 3)
        found.append(f'what samples hold ({among}), {key} of {name}: {one[name].get(key)} then, '
                     f'{other[name].get(key)} now')
    parts = [side['parts'] if isinstance(side.get('parts'), list) else [] for side in (then, now)]
    found += [f'part {i}: {text}' for i, pair in enumerate(zip(*parts)) if all(isinstance(p, Mapping) for p in pair)
              for text in differences(*pair)]
    return [textwrap.shorten(text, 600, placeholder=' …') for text in found]


def _contents(found: Mapping) -> dict[str, Mapping]:
    content = found.get('content')
    return {k: v for k, v in content.items() if isinstance(v, Mapping)} if isinstance(content, Mapping) else {}


def _alike(one, other) -> bool:
    """Equal, but for last digits."""
    if one == other:
        return True
    if not all(isinstance(v, list) and len(v) == 2 and isinstance(v[1], list) for v in (one, other)) \
            or one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    if not all(map(is_number, one[1] + other[1])):
        return False
    size = max(map(abs, one[1] + other[1]))
    return all(abs(a - b) <= TOLERANCE * size for a, b in zip(one[1], other[1]))
