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
``ema_state_dict``, ``optimizer``, ``param_schedulers``, ``rng``, ``message_hub``, ``gradients``, ``epoch_scalars``,
``buffers``
    what resuming needs (gradients only between two steps of an accumulation, scalars only inside an epoch, and buffers,
    of each of several ranks, too); absent in best and fused checkpoints.

Nothing in a file is ever executed: pickles are read with an allow-list, configs are data.
"""
import argparse
import json
import pickle
import re
import textwrap
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ewa3d.checks import some
from ewa3d.datasets.pickles import ALLOWED, with_arrays
from ewa3d.engine.bounds import check_archive, check_pickles, check_tree
from ewa3d.engine.plain import checksum, storable, to_plain
from ewa3d.files import atomic_write, check_writable
from ewa3d.layers.experts import iter_experts

__all__ = ['FORMAT_VERSION', 'SUFFIXES', 'check_target', 'read_checkpoint', 'save_torch', 'write_checkpoint',
           'select_weights', 'load_model_state', 'load_any', 'find_last_checkpoint', 'NewerFormatError']

FORMAT_VERSION = 1
SUFFIXES = ('.pth', '.safetensors')


class NewerFormatError(ValueError):
    """A checkpoint of a later release: not damaged, but not readable here."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
def check_target(out: str | Path, source: str | Path, suffixes: tuple[str, ...] = SUFFIXES) -> Path:
    """``out`` as a path, if a file made from ``source`` can be written there.

    Raises:
        ValueError: another suffix, a folder, or ``source`` itself. OSError: a folder that cannot be written to.
    """
    out = Path(out)
    if out.suffix not in suffixes:
        raise ValueError(f'{out}: the name must end in {" or ".join(suffixes)}, got {out.suffix!r}')
    if out.is_dir():
        raise ValueError(f'{out} is a folder; the name of a file was expected')
    if out.resolve() == Path(source).resolve():
        raise ValueError(f'{out} is the checkpoint itself, which would be lost; give another name')
    check_writable(out.parent, 'the folder')
    return out


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
    weights = storable(state_dict, 'state_dict')
    if path.suffix == '.safetensors':
        if parts:
            raise ValueError(f'{path}: a safetensors file holds weights only, not {", ".join(sorted(parts))}')
        _write_safetensors(path, weights, meta)
        return path
    checkpoint = dict(format_version=FORMAT_VERSION, meta=meta, state_dict=weights,
                      **{k: storable(v, k) for k, v in parts.items()})
    checkpoint['checksum'] = checksum(checkpoint)
    save_torch(path, checkpoint)
    return path


class _Sink:
    """A file for torch's writer, which is C++ and may take the process down when a write raises: the first error is
    kept for later, and what comes after it goes nowhere."""

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """Nothing: the file is flushed by who opened it."""


def save_torch(path: Path, content: Mapping) -> None:
    """``torch.save``, atomically, with an error where there is no space."""
    def save(file) -> None:
        sink = _Sink(file)
        torch.save(content, sink)
        if sink.error is not None:
            raise sink.error

    atomic_write(path, save)


def _write_safetensors(path: Path, weights: dict, meta: dict) -> None:
    from safetensors.torch import save
    digest = checksum(dict(format_version=FORMAT_VERSION, meta=meta, state_dict=weights))
    header = dict(format='pt', format_version=str(FORMAT_VERSION), checksum=digest, meta=json.dumps(meta))
    blob = save({k: v.clone() for k, v in weights.items()}, metadata=header)  # tied weights must not share memory
    atomic_write(path, blob)


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
_RUNNERS_WITH_METRIC = ('runner_pretrain', 'runner_finetune', 'runner_BERT_pretrain', 'runner_BERT_finetune')


def _inert_classes() -> list:
    """What a pickle may name beyond torch's own list: values without behaviour, found in published checkpoints.

    Old files of Point-BERT and Point-MAE hold their accuracy as an object of a class of theirs. Its attributes are read
    into a namespace; the class is neither looked for nor needed. Arrays and numbers of numpy are made here.
    """
    arrays = [(value, f'{module}.{name}') for (module, name), value in ALLOWED.items() if module.startswith('numpy')]
    metrics = [(argparse.Namespace, f'tools.{runner}.Acc_Metric') for runner in _RUNNERS_WITH_METRIC]
    return [argparse.Namespace, OrderedDict, *arrays, *metrics]


def read_checkpoint(path: str | Path, map_location='cpu') -> dict:
    """Read a checkpoint of ours, or a foreign one, without executing anything.

    Returns:
        For our files the dict described in the module's docstring; for a foreign ``.pth`` whatever dict it holds (a
        plain state dict, or nested as other projects nest it); for ``.safetensors`` ``dict(state_dict=…, meta=…)``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, truncated, corrupt, fails its checksum, was written by a newer ewa3d, has an
            entry of another type than is expected there, or is a pickle that wants to import something (the refused
            name is in the message).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if not path.is_file():
        raise ValueError(f'checkpoint {path} is not a file')
    if path.stat().st_size == 0:
        raise ValueError(f'checkpoint {path} is empty')
    checkpoint = _read_safetensors(path) if path.suffix == '.safetensors' else _read_pickle(path)
    try:
        check_tree(checkpoint, path.stat().st_size)
    except ValueError as error:
        raise ValueError(f'checkpoint {path} holds what no checkpoint of ewa3d does ({error})') from None
    if 'format_version' in checkpoint:
        _verify(checkpoint, path)
    _check_entries(checkpoint, path)
    return _to_device(checkpoint, map_location)


def _read_pickle(path: Path) -> dict:
    try:
        check_archive(path)
        check_pickles(path)
        with torch.serialization.safe_globals(_inert_classes()):
            checkpoint = with_arrays(torch.load(path, map_location='cpu', weights_only=True), {})
    except pickle.UnpicklingError as error:
        asked = re.search(r'GLOBAL (\S+)', str(error))
        reason = (f'its pickle asks for {asked.group(1)!r}, which is not on the list of inert types' if asked else
                  'its pickle is damaged, or does more than to hold tensors and plain values')
        raise ValueError(f'checkpoint {path} was refused: {reason}. Nothing in it was run.') from None
    except Exception as error:  # damaged bytes can make the unpickler fail in any way
        raise ValueError(f'checkpoint {path} cannot be read; it is truncated, corrupt or no PyTorch file '
                         f'({_detail(error)})') from None
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
        if {'format_version', 'checksum'} & header.keys():  # one is enough: the other name may be what is damaged
            checkpoint.update(format_version=int(header.get('format_version', 0)), checksum=header.get('checksum'))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f'checkpoint {path} cannot be read; it is truncated, corrupt or no safetensors file '
                         f'({_detail(error)})') from None
    return checkpoint


def _detail(error: Exception) -> str:
    """The first sentence of an error of the reader; never its advice to read the file without protection."""
    text = (str(error).strip().splitlines() or [''])[0].partition('. ')[0].rstrip('.')
    text = textwrap.shorten(text, 200, placeholder=' …')
    return type(error).__name__ if not text or 'weights_only' in text else f'{type(error).__name__}: {text}'


def _verify(checkpoint: dict, path: Path) -> None:
    """Version and checksum of a file of ours."""
    version = checkpoint['format_version']
    if not isinstance(version, int) or version < 1:
        raise ValueError(f'checkpoint {path} has format_version {version!r}; a positive integer was expected')
    if version > FORMAT_VERSION:
        raise NewerFormatError(f'checkpoint {path} has format version {version}, this ewa3d reads up to '
                               f'{FORMAT_VERSION}; it was written by a newer release, which can read it: pip install '
                               '--upgrade ewa3d')
    for key in ('meta', 'state_dict'):
        if key not in checkpoint:
            raise ValueError(f'checkpoint {path} has no {key!r}')
    try:
        digest = checksum(checkpoint)
    except Exception as error:  # sparse tensors, lists that hold themselves: nothing that was written here
        raise ValueError(f'checkpoint {path} holds what no checkpoint of ewa3d does ({_detail(error)})') from None
    if checkpoint.get('checksum') != digest:
        raise ValueError(f'checkpoint {path} does not match its checksum; the file was damaged or edited')


# What the rest of the package takes for granted: entry → type and its name. Foreign files may lack all of them.
_TYPES = {'meta': (Mapping, 'a dict'), 'meta.dataset_meta': (Mapping, 'a dict'), 'state_dict': (Mapping, 'a dict'),
          'meta.dataset_meta.classes': (list, 'a list'), 'meta.epoch': (int, 'an integer'),
          'meta.iter': (int, 'an integer'), 'meta.seed': (int, 'an integer'), 'meta.epoch_length': (int, 'an integer')}
_TYPES_OF_OURS = {'meta.data': (Mapping, 'a dict'), 'ema_state_dict': (Mapping, 'a dict'),
                  'optimizer': (Mapping, 'a dict'), 'rng': (list, 'a list'), 'message_hub': (Mapping, 'a dict'),
                  'gradients': (list, 'a list'), 'buffers': (list, 'a list'),
                  'epoch_scalars': (Mapping, 'a dict')}


def _check_entries(checkpoint: dict, path: Path) -> None:
    """Raise ``ValueError`` where an entry has not the type that everything after reading relies on."""
    ours = 'format_version' in checkpoint
    for where, (kind, name) in {**_TYPES, **(_TYPES_OF_OURS if ours else {})}.items():
        value = checkpoint
        for key in where.split('.'):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"checkpoint {path}: {where} is a {type(value).__name__}; {name} was expected")
    for where, entries in (('the file', checkpoint), *((key, checkpoint.get(key) or {}) for key in
                                                       ('state_dict', 'ema_state_dict'))):
        if not isinstance(entries, Mapping):
            continue  # of a foreign file, which nothing here reads
        for key, value in entries.items():
            if not isinstance(key, str):
                raise ValueError(f'checkpoint {path}: {where} has the key {key!r}; names (strings) were expected')
            if ours and entries is not checkpoint and not isinstance(value, Tensor):
                raise ValueError(f'checkpoint {path}: {where}[{key!r}] is a {type(value).__name__}; a tensor was '
                                 'expected')


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


def find_last_checkpoint(work_dir: str | Path) -> Path | None:
    """The checkpoint that ``work_dir/last_checkpoint`` points to; ``None`` where no run has saved one.

    The pointer holds a full path, as mmengine writes it; where the folder has moved since, the file of the same name
    beside the pointer is meant.

    Raises:
        FileNotFoundError: the pointer names a file that is not there, or there are checkpoints without a pointer.
    """
    pointer = Path(work_dir) / 'last_checkpoint'
    if not pointer.is_file():
        saved = [p for kind in ('epoch', 'iter') for p in Path(work_dir).glob(f'{kind}_*.pth')]
        if saved:
            raise FileNotFoundError(f'{work_dir} has checkpoints and no last_checkpoint that says which is the last')
        return None
    target = Path(pointer.read_text(encoding='utf-8', errors='replace').strip())
    beside = pointer.parent / target.name
    if beside.is_file():  # preferred: a copied folder must not resume from the original
        return beside
    if target.is_file():
        return target
    raise FileNotFoundError(f'{pointer} names {str(target)[:200]!r}, which is no file')


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

    Raises:
        ValueError: another name, or the checkpoint does not hold these.
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
    odd = next((k for k, v in state.items() if not isinstance(v, Tensor)), None)
    if odd is not None:
        raise ValueError(f'{name}: {odd!r} is a {type(state[odd]).__name__}; a tensor was expected')
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
            lines.append(f'{len(keys)} {label} ({some(keys, 3)})')
    if shapes:
        described = [f'{key}: {tuple(state[key].shape)}, the model has {tuple(backup[key].shape)}' for key in shapes]
        lines.append(f'{len(shapes)} of another shape ({some(described, 3)})')
    raise ValueError('; '.join(lines) + '. ' + _likely_cause(model, state, backup, shapes, matched))


def load_any(model: nn.Module, checkpoint: Mapping, state_dict: Mapping, name: str = 'checkpoint',
             transfer: bool = False) -> None:
    """Load all of a model's weights: ours strictly, a known project's after renaming (see ``models/weights.py``).

    With ``transfer``, a task model takes the backbone of a pretraining model's weights.
    """
    from ewa3d.models.weights import is_pretraining, load_plain
    if 'format_version' not in checkpoint:
        load_plain(model, checkpoint, strict='transfer' if transfer else True, name=name)
    elif transfer and is_pretraining(state_dict) and not is_pretraining(model.state_dict()):
        load_plain(model, state_dict, strict='transfer', name=name)
    else:
        load_model_state(model, state_dict, name)


def _likely_cause(model: nn.Module, state: dict, own: dict, shapes: list, matched: int) -> str:
    here, there = ({k: tuple(tree[k].shape) for k in shapes} for tree in (own, state))
    if any(there[k][1:] == here[k] for k in shapes):
        return ('The checkpoint is expanded and the model plain: fuse it with tools/fuse.py, or use the config it was '
                'trained with.')
    if shapes and all(here[k][1:] == there[k][1:] for k in shapes):  # only the first dimension differs
        key = shapes[-1]
        if set(shapes) <= _expert_keys(model):
            return (f'The checkpoint has E={there[key][0]} experts, the model E={here[key][0]}: set '
                    f'num_experts={there[key][0]}.')
        if set(shapes) <= _output_keys(own):
            return (f'The number of classes differs: {there[key][0]} in the checkpoint, {here[key][0]} in the model. '
                    'To train on other classes, model.pretrained=CHECKPOINT loads the backbone and leaves the head.')
    if matched * 2 < len(own):
        return 'It looks like a checkpoint of another model.'
    return 'The model was built with another config.'


def _expert_keys(model: nn.Module) -> set[str]:
    return {f'{name}.{key}' for name, module in iter_experts(model) for key in module.state_dict()}


def _output_keys(own: Mapping) -> set[str]:
    """The last layer's parameters; the last of the head where the model has one."""
    keys = [key for key in own if key.startswith('head.')] or list(own)
    layer = keys[-1].rpartition('.')[0]
    return {key for key in keys if key.rpartition('.')[0] == layer}
