"""What may stand in a file: JSON-able data, tensors and plain Python values, and their checksum."""
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ['checksum', 'storable', 'to_plain']


def to_plain(value, where: str = 'value'):
    """``value`` as JSON-able data: dicts with string keys, lists, strings, numbers, booleans, ``None``.

    Tuples and arrays become lists, a class or function becomes its name.

    Raises:
        TypeError: something has no such form; ``where`` and the path to it are named.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): to_plain(v, f'{where}.{k}') for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [to_plain(v, f'{where}[{i}]') for i, v in enumerate(items)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if callable(value) and hasattr(value, '__name__'):
        return value.__name__
    raise TypeError(f'{where} is a {type(value).__name__}, which has no JSON form; use numbers, strings, lists, dicts')


def storable(value, where: str):
    """``value`` as what ``weights_only`` reading accepts: tensors on the CPU and plain Python values.

    Raises:
        TypeError: something else is in it; ``where`` and the path to it are named.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return value
    if hasattr(value, 'full_tensor'):  # a DTensor: gathering it takes all ranks
        raise TypeError(f'{where} is a DTensor, of which each rank has a part; gather it before, with '
                        'get_model_state_dict(…, options=StateDictOptions(full_state_dict=True)) on all ranks')
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # A view would drag its whole storage into the file.
        shared = value.untyped_storage().nbytes() != value.numel() * value.element_size()
        return value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
    if isinstance(value, Mapping):
        kind = Counter if isinstance(value, Counter) else dict
        return kind({k: storable(v, f'{where}.{k}') for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(storable(v, f'{where}[{i}]') for i, v in enumerate(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    raise TypeError(f'{where} is a {type(value).__name__}; a checkpoint holds tensors and plain Python values only')


def _digest(value, sha) -> None:
    """Feed ``value`` to ``sha``, unambiguously and independent of the order of dict keys."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        sha.update(f't{value.dtype}{tuple(value.shape)}'.encode())
        sha.update(flat.view(torch.uint8).numpy() if flat.numel() else b'')
    elif isinstance(value, Mapping):
        sha.update(b'{%d' % len(value))
        for key in sorted(value, key=lambda k: (type(k).__name__, str(k))):
            sha.update(f'k{type(key).__name__}:{key}='.encode())
            _digest(value[key], sha)
    elif isinstance(value, (list, tuple)):
        sha.update(b'[%d' % len(value))
        for item in value:
            _digest(item, sha)
    else:
        text = repr(value).encode()
        sha.update(b'v%d:' % len(text) + text)


def checksum(checkpoint: Mapping) -> str:
    """A sha256 over everything but the entry ``checksum`` itself."""
    sha = hashlib.sha256()
    _digest({k: v for k, v in checkpoint.items() if k != 'checksum'}, sha)
    return sha.hexdigest()
