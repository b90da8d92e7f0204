"""h5 files with many clouds, as ModelNet and ScanObjectNN come in: ``data`` ``(n, N, 3)`` and ``label`` ``(n,)``."""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ewa3d.datasets.io import read_h5

__all__ = ['read_labels', 'read_data', 'check_range']


def read_labels(file: Path, num_classes: int) -> list[int]:
    """The label of every cloud.

    Raises:
        FileNotFoundError, ValueError: no such file, a broken one, no ``label``, other than one integer from 0 to
            ``num_classes`` − 1 a cloud.
    """
    labels, = read_h5(file, 'label')
    if labels.dtype.kind not in 'iu' or labels.ndim not in (1, 2) or labels.size != len(labels):
        raise ValueError(f"{file}: 'label' should hold one integer a shape, got {labels.dtype} of the shape "
                         f'{labels.shape}')
    return check_range(file, labels.reshape(-1).tolist(), num_classes)


def check_range(file: Path, labels: Sequence[int], num_classes: int) -> Sequence[int]:
    """``labels``, or an error that names the first that has no class."""
    for i, label in enumerate(labels):
        if not 0 <= label < num_classes:
            raise ValueError(f'{file}: label {label} of shape {i} is not one of the {num_classes} classes (0 … '
                             f'{num_classes - 1})')
    return labels


def read_data(file: Path, *keys: str) -> list[np.ndarray]:
    """``data`` and other arrays that have a row a point: ``(n, N, 3)``, and ``(n, N)`` or ``(n, N, C)``.

    Raises:
        ValueError: an array is missing, or its shape does not go with that of ``label``, or of ``data``.
    """
    labels, data, *others = read_h5(file, 'label', 'data', *keys)
    if data.ndim != 3 or data.shape[-1] < 3 or len(data) != len(labels):
        raise ValueError(f"{file}: 'data' should have the shape ({len(labels)}, points, 3) like 'label', got "
                         f'{data.shape}')
    for key, array in zip(keys, others):
        if array.shape[:2] != data.shape[:2]:
            raise ValueError(f'{file}: {key!r} has the shape {array.shape}, \'data\' {data.shape}')
    return [data, *others]
