"""The one place that reads and writes checkpoints: safe, atomic, checked.

A checkpoint is a ``.pth`` file with a dict of tensors and plain Python values (``torch.load(weights_only=True)`` reads
it), or a ``.safetensors`` file with weights only. Keys:

``format_version``, ``checksum``
    a sha256 over everything else, in an order that does not depend on how dicts were filled;
``meta``
    JSON-able: ``cfg`` (the resolved config as nested dicts: data, never code), ``epoch``, ``iter``, ``seed``,
    ``dataset_meta``, ``versions``, ``time``, ``metrics``, ``weights`` (``'raw'``, or ``'ema'`` when averaged);
``state_dict``
    the weights one would deploy: the averaged ones where the run has a model EMA;
``ema_state_dict``, ``optimizer``, ``param_schedulers``, ``rng``, ``message_hub``, ``gradients``
    what resuming needs (gradients only between two steps of an accumulation); absent in best and fused checkpoints.

Nothing in a file is ever executed: pickles are read with an allow-list, configs are data.
"""
import argparse
import hashlib
import json
import os
import pickle
import re
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ['FORMAT_VERSION', 'read_checkpoint', 'write_checkpoint', 'select_weights', 'load_model_state', 'load_any',
           'find_last_checkpoint', 'to_plain', 'atomic_write']

FORMAT_VERSION = 1
SUFFIXES = ('.pth', '.safetensors')


# ---------------------------------------------------------------------------------------------------------------------
# Plain data
# ---------------------------------------------------------------------------------------------------------------------
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


def _storable(value, where: str):
    """``value`` as what ``weights_only`` reading accepts: tensors on the CPU and plain Python values."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # A view would drag its whole storage into the file.
        shared = value.untyped_storage().nbytes() != value.numel() * value.element_size()
        return value.clone(memory_format=torch.contiguous_format) if shared else value.contiguous()
    if isinstance(value, Mapping):
        kind = Counter if isinstance(value, Counter) else dict
        return kind({k: _storable(v, f'{where}.{k}') for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_storable(v, f'{where}[{i}]') for i, v in enumerate(value))
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


def _checksum(checkpoint: Mapping) -> str:
    sha = hashlib.sha256()
    _digest({k: v for k, v in checkpoint.items() if k != 'checksum'}, sha)
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
def atomic_write(path: str | Path, write) -> None:
    """Call ``write(file)`` on a temporary binary file beside ``path``, flush it to the disk, rename it to ``path``.

    Whatever happens, ``path`` is the old file or the complete new one.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f'{path} is a folder; the name of a file was expected')
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.', suffix='.tmp')
    try:
        with os.fdopen(handle, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private; a checkpoint is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_checkpoint(path: str | Path, state_dict: Mapping, meta: Mapping | None = None, **parts) -> Path:
    """Write a checkpoint atomically, with format version and checksum.

    Args:
        path: ``*.pth``, or ``*.safetensors`` for weights and meta only.
        state_dict: name → tensor.
        meta: JSON-able information, see the module's docstring.
        **parts: further entries (``optimizer``, ``rng``, …): tensors and plain Python values.

    Raises:
        ValueError: another suffix, or ``parts`` for a safetensors file.
        TypeError: an entry that could not be read back safely; its path is named.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f'{path}: a checkpoint ends in .pth or .safetensors, got {path.suffix!r}')
    meta = to_plain(meta or {}, 'meta')
    weights = _storable(state_dict, 'state_dict')
    if path.suffix == '.safetensors':
        if parts:
            raise ValueError(f'{path}: a safetensors file holds weights only, not {", ".join(sorted(parts))}')
        _write_safetensors(path, weights, meta)
        return path
    checkpoint = dict(format_version=FORMAT_VERSION, meta=meta, state_dict=weights,
                      **{k: _storable(v, k) for k, v in parts.items()})
    checkpoint['checksum'] = _checksum(checkpoint)
    atomic_write(path, lambda file: torch.save(checkpoint, file))
    return path


def _write_safetensors(path: Path, weights: dict, meta: dict) -> None:
    from safetensors.torch import save
    checksum = _checksum(dict(format_version=FORMAT_VERSION, meta=meta, state_dict=weights))
    header = dict(format='pt', format_version=str(FORMAT_VERSION), checksum=checksum, meta=json.dumps(meta))
    blob = save({k: v.clone() for k, v in weights.items()}, metadata=header)  # tied weights must not share memory
    atomic_write(path, lambda file: file.write(blob))


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def _inert_classes() -> list:
    """What a pickle may name beyond torch's own list: values without behaviour, found in published checkpoints."""
    core = getattr(np, '_core', None) or np.core
    dtypes = [type(np.dtype(code)) for code in '?bhilqBHILQefd']
    allowed: list = [argparse.Namespace, OrderedDict, np.dtype, np.ndarray, *dtypes]
    for package in ('numpy.core', 'numpy._core'):  # numpy 1 and numpy 2 write different names for the same functions
        allowed.append((core.multiarray.scalar, f'{package}.multiarray.scalar'))
        allowed.append((core.multiarray._reconstruct, f'{package}.multiarray._reconstruct'))
    return allowed


def read_checkpoint(path: str | Path, map_location='cpu') -> dict:
    """Read a checkpoint of ours, or a foreign one, without executing anything.

    Returns:
        For our files the dict described in the module's docstring; for a foreign ``.pth`` whatever dict it holds (a
        plain state dict, or nested as other projects nest it); for ``.safetensors`` ``dict(state_dict=…, meta=…)``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, corrupt, fails its checksum, was written by a newer ewa3d, or is a
            pickle that wants to import something (the refused name is in the message).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if not path.is_file():
        raise ValueError(f'checkpoint {path} is not a file')
    if path.stat().st_size == 0:
        raise ValueError(f'checkpoint {path} is empty')
    checkpoint = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pickle(path)
    if 'format_version' in checkpoint:
        _verify(checkpoint, path)
    return _to_device(checkpoint, map_location)


def _read_pickle(path: Path) -> dict:
    try:
        with torch.serialization.safe_globals(_inert_classes()):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r'GLOBAL (\S+)', str(error))
        if refused:
            raise ValueError(f'checkpoint {path} was refused: its pickle asks for {refused.group(1)!r}, which is not '
                             'on the list of inert types. Nothing in it was run.') from None
        raise ValueError(f'checkpoint {path} was refused: {_first_line(error)}') from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError,
            AssertionError, UnicodeDecodeError, ImportError, OverflowError, MemoryError, LookupError) as error:
        raise ValueError(f'checkpoint {path} cannot be read; it is truncated, corrupt or no PyTorch file '
                         f'({type(error).__name__}: {_first_line(error)})') from None
    if isinstance(checkpoint, argparse.Namespace):
        checkpoint = vars(checkpoint)
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'checkpoint {path} holds a {type(checkpoint).__name__}; a dict was expected')
    return dict(checkpoint)


def _read_safetensors(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework='pt', device='cpu') as file:
            header = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        checkpoint = dict(state_dict=weights, meta=json.loads(header.get('meta', '{}')))
        if 'format_version' in header:
            checkpoint.update(format_version=int(header['format_version']), checksum=header.get('checksum'))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f'checkpoint {path} cannot be read; it is truncated, corrupt or no safetensors file '
                         f'({_first_line(error)})') from None
    return checkpoint


def _verify(checkpoint: dict, path: Path) -> None:
    version = checkpoint['format_version']
    if not isinstance(version, int) or version < 1:
        raise ValueError(f'checkpoint {path} has format_version {version!r}; a positive integer was expected')
    if version > FORMAT_VERSION:
        raise ValueError(f'checkpoint {path} has format version {version}, this ewa3d reads up to {FORMAT_VERSION}; '
                         'it was written by a newer release')
    for key in ('meta', 'state_dict'):
        if not isinstance(checkpoint.get(key), Mapping):
            raise ValueError(f'checkpoint {path} has no {key!r}')
    if checkpoint.get('checksum') != _checksum(checkpoint):
        raise ValueError(f'checkpoint {path} does not match its checksum; the file was damaged or edited')


def _to_device(value, device):
    if str(device) == 'cpu':
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _to_device(v, device) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_to_device(v, device) for v in value)
    return value


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:200] if text else type(error).__name__


def find_last_checkpoint(work_dir: str | Path) -> Path | None:
    """The checkpoint that ``work_dir/last_checkpoint`` points to; ``None`` where no run has saved one.

    The pointer holds a full path, as mmengine writes it; where the folder has moved since, the file of the same name
    beside the pointer is meant.
    """
    pointer = Path(work_dir) / 'last_checkpoint'
    if not pointer.is_file():
        return None
    target = Path(pointer.read_text(encoding='utf-8').strip())
    beside = pointer.parent / target.name
    if beside.is_file():  # preferred: a copied folder must not resume from the original
        return beside
    if target.is_file():
        return target
    raise FileNotFoundError(f'{pointer} names {target}, which does not exist; give the checkpoint to resume from')


# ---------------------------------------------------------------------------------------------------------------------
# Using what was read
# ---------------------------------------------------------------------------------------------------------------------
def select_weights(checkpoint: Mapping, weights: str = 'default') -> tuple[dict, str]:
    """The weights of a checkpoint and what they are: ``'raw'`` or ``'ema'``.

    A run with a model EMA stores the averaged weights as ``state_dict`` and the trained ones in ``ema_state_dict``
    (mmengine's convention).

    Args:
        checkpoint: what :func:`read_checkpoint` returned.
        weights: ``'default'`` (whatever ``state_dict`` holds), ``'ema'`` or ``'raw'``.
    """
    if weights not in ('default', 'ema', 'raw'):
        raise ValueError(f"weights must be 'default', 'ema' or 'raw', got {weights!r}")
    state = checkpoint.get('state_dict', checkpoint)
    meta = checkpoint.get('meta') or {}
    has_ema = 'ema_state_dict' in checkpoint
    kind = 'ema' if has_ema else str(meta.get('weights', 'raw'))
    if weights in ('default', kind):
        return dict(state), kind
    if weights == 'raw' and has_ema:
        other = checkpoint['ema_state_dict']
        return {k.removeprefix('module.'): v for k, v in other.items() if k.startswith('module.')}, 'raw'
    raise ValueError(f'the checkpoint holds {kind} weights only; {weights} weights were asked for')


def load_model_state(model: nn.Module, state_dict: Mapping, name: str = 'checkpoint') -> None:
    """``model.load_state_dict(strict=True)`` with an error that says what is likely.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ; nothing was loaded in that case.
    """
    state = {k.removeprefix('module.'): v for k, v in state_dict.items()}
    backup = {k: v.detach().clone() for k, v in model.state_dict().items()}
    try:
        result = model.load_state_dict(state, strict=False)
        missing, unexpected, shapes = list(result.missing_keys), list(result.unexpected_keys), []
    except RuntimeError:  # strict=False still raises for shapes
        missing, unexpected = sorted(set(backup) - set(state)), sorted(set(state) - set(backup))
        shapes = [key for key in backup if key in state and state[key].shape != backup[key].shape]
    if not (missing or unexpected or shapes):
        return
    model.load_state_dict(backup)
    matched = len(set(state) & set(backup)) - len(shapes)
    lines = [f'{name} does not fit the model: {matched} of {len(backup)} entries match']
    for label, keys in (('missing', missing), ('unexpected', unexpected)):
        if keys:
            lines.append(f'{len(keys)} {label} ({_some(keys)})')
    if shapes:
        described = [f'{key}: {tuple(state[key].shape)}, the model has {tuple(backup[key].shape)}' for key in shapes]
        lines.append(f'{len(shapes)} of another shape ({_some(described)})')
    raise ValueError('; '.join(lines) + '. ' + _likely_cause(state, backup, shapes, matched))


def load_any(model: nn.Module, checkpoint: Mapping, state_dict: Mapping, name: str = 'checkpoint') -> None:
    """Load all of a model's weights: ours strictly, a known project's after renaming (see ``models/weights.py``)."""
    if 'format_version' in checkpoint:
        load_model_state(model, state_dict, name)
    else:
        from ewa3d.models.weights import load_plain
        try:
            load_plain(model, checkpoint)
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from None


def _some(items: list, n: int = 3) -> str:
    return ', '.join(map(str, items[:n])) + (', …' if len(items) > n else '')


def _likely_cause(state: dict, own: dict, shapes: list, matched: int) -> str:
    stacked = [k for k in shapes if state[k].ndim == own[k].ndim + 1 and state[k].shape[1:] == own[k].shape]
    if stacked:
        return ('The checkpoint is expanded and the model plain: fuse it with tools/fuse.py, or use the config it was '
                'trained with.')
    if shapes and all(state[k].ndim == own[k].ndim and state[k].shape[1:] == own[k].shape[1:] for k in shapes):
        classes = state[shapes[-1]].shape[0], own[shapes[-1]].shape[0]
        return f'The number of classes differs: {classes[0]} in the checkpoint, {classes[1]} in the model.'
    if matched * 2 < len(own):
        return 'It looks like a checkpoint of another model.'
    return 'The model was built with another config.'
