"""Plain weights from elsewhere: rename tables as data, one loader, one report."""
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mmengine.logging import print_log
from torch import Tensor, nn

from ewa3d.registry import nearest

__all__ = ['RENAMES', 'LoadReport', 'load_plain', 'num_outputs', 'rename']

_POINT_TRANSFORMER = (
    ('encoder.', 'backbone.tokenizer.encoder.'), ('reduce_dim.', 'backbone.tokenizer.reduce_dim.'),
    ('pos_embed.', 'backbone.tokenizer.pos_embed.'), ('blocks.blocks.', 'backbone.blocks.'),
    ('norm.', 'backbone.norm.'))

# Prefixes there and here, by layout. The checkpoints' own names are those of the projects' released files.
RENAMES: dict[str, tuple[tuple[str, str], ...]] = {
    'point_mae': _POINT_TRANSFORMER + (  # the classifier; Point-BERT's has the same names
        ('cls_token', 'backbone.cls_token'), ('cls_pos', 'backbone.cls_pos'), ('cls_head_finetune.', 'head.layers.')),
    'point_mae_pretrain': tuple(('MAE_encoder.' + there, here) for there, here in _POINT_TRANSFORMER),
}
# Of a pretraining checkpoint only the encoder goes into a task model.
IGNORED = {'point_mae_pretrain': ('mask_token', 'decoder_pos_embed.', 'MAE_decoder.', 'increase_dim.')}
# 1×1 convolutions there are linear layers here; the loader squeezes, the way back puts the dimension on again.
CONVOLUTIONS = tuple(f'encoder.{name}.weight' for name in
                     ('first_conv.0', 'first_conv.3', 'second_conv.0', 'second_conv.3'))
_NESTED = ('state_dict', 'base_model', 'model_state_dict', 'model')


class LoadReport(NamedTuple):
    """What :func:`load_plain` did; keys are ours, ``unexpected`` ones the checkpoint's."""
    layout: str
    matched: list[str]
    missing: list[str]
    unexpected: list[str]
    skipped: list[str]

    def __str__(self) -> str:
        lines = [f'{len(self.matched)} tensors loaded (layout: {self.layout})']
        for title, keys in (('not in the checkpoint', self.missing), ('not in the model', self.unexpected),
                            ('skipped', self.skipped)):
            if keys:
                lines.append(f'{len(keys)} {title}: {_some(keys)}')
        return '; '.join(lines)


def rename(state: Mapping[str, Tensor], layout: str, reverse: bool = False) -> dict[str, Tensor]:
    """``state`` with the keys of this package, or with ``reverse`` the keys and shapes of the layout's own project.

    Keys that the table does not name are kept (``reverse``: left out).

    Raises:
        KeyError: an unknown layout.
    """
    if layout not in RENAMES:
        raise KeyError(f'{layout!r} is no known weight layout; {nearest(layout, RENAMES)}')
    renamed = {}
    for key, value in state.items():
        for there, here in RENAMES[layout]:
            old, new = (here, there) if reverse else (there, here)
            if key.startswith(old):
                name = new + key[len(old):]
                renamed[name] = value.unsqueeze(-1) if reverse and name.endswith(CONVOLUTIONS) else value
                break
        else:
            if not reverse:
                renamed[key] = value
    return renamed


def load_plain(model: nn.Module, source: str | Path | Mapping, strict: bool = True,
               skip_head: bool | str = False) -> LoadReport:
    """Load plain weights into ``model``: ours, or those of a known project (recognised by their names).

    Args:
        source: a checkpoint's path, or its content.
        strict: raise where the model lacks a tensor or the checkpoint has one that the model has no place for. Without
            it, such tensors are reported, and at least half of the backbone must be found.
        skip_head: leave the head as it is: ``True``, or ``'mismatched'`` where its shapes differ.

    Returns:
        a :class:`LoadReport`; without ``strict``, it is logged as well.

    Raises:
        FileNotFoundError, ValueError: no such file, not a checkpoint, weights of another model (nothing is loaded).
    """
    name = str(source) if isinstance(source, (str, Path)) else 'the given weights'
    state = _state_dict(source, name)
    own = model.state_dict()
    layout, state, ignored = _recognise(state, own)
    state, skipped = _without_head(state, own, skip_head, name)
    matched = [key for key in own if key in state]
    missing = [key for key in own if key not in state and key not in skipped]
    unexpected = [key for key in state if key not in own]
    report = LoadReport(layout, matched, missing, unexpected, skipped + ignored)
    _refuse_expanded(state, own, name)
    _check(report, own, strict, name)
    backup = {key: own[key].clone() for key in matched}
    try:
        model.load_state_dict({key: state[key] for key in matched}, strict=False)
    except RuntimeError as error:
        model.load_state_dict(backup, strict=False)
        raise ValueError(f'{name} has other shapes than the model: {" ".join(str(error).split())}') from None
    if not strict:
        print_log(f'{name}: {report}', logger='current')
    return report


def num_outputs(checkpoint: Mapping) -> int | None:
    """The rows of the head's last layer in a checkpoint of ours or of a known project: how many classes it tells."""
    state = _state_dict(checkpoint, 'the checkpoint')
    for weights in (state, *(rename(state, layout) for layout in RENAMES)):
        layers = [key for key, value in weights.items() if key.startswith('head.') and value.ndim > 1]
        if layers:  # safetensors sorts names as text: layer 10 before layer 2
            last = sorted(layers, key=lambda key: [int(number) for number in re.findall(r'\d+', key)])[-1]
            return int(weights[last].shape[-2])
    return None


def _state_dict(source: str | Path | Mapping, name: str) -> dict[str, Tensor]:
    if isinstance(source, (str, Path)):
        from ewa3d.engine.checkpoint import read_checkpoint
        source = read_checkpoint(source)
    for key in _NESTED:
        if isinstance(source.get(key), Mapping):
            source = source[key]
            break
    state = {key.removeprefix('module.'): value for key, value in source.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f'{name} holds no tensors; found the keys {_some([str(key) for key in source])}')
    return state


def _recognise(state: dict, own: dict) -> tuple[str, dict, list[str]]:
    """The layout under which most keys are the model's, the state renamed by it, and the keys that it leaves out."""
    candidates = [('ewa3d', state, [])]
    for layout in RENAMES:
        ignored = [key for key in state if key.startswith(IGNORED.get(layout, ('\0',)))]
        kept = {key: value for key, value in state.items() if key not in ignored}
        candidates.append((layout, rename(kept, layout), ignored))
    return max(candidates, key=lambda candidate: sum(key in own for key in candidate[1]))


def _without_head(state: dict, own: dict, skip_head: bool | str, name: str) -> tuple[dict, list[str]]:
    head = [key for key in state if key.startswith('head.')]
    differing = [key for key in head if key in own and state[key].shape != own[key].shape]
    if differing and not skip_head:
        key = differing[-1]
        raise ValueError(f"{name}: the head's {key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)} "
                         '(another number of classes?); skip_head=True leaves the head as it is')
    if skip_head is True or differing:
        return {key: value for key, value in state.items() if key not in head}, \
            sorted({*head, *(key for key in own if key.startswith('head.'))})
    return state, []


def _refuse_expanded(state: dict, own: dict, name: str) -> None:
    """Stacked experts have the plain names and one leading dimension."""
    stacked = [key for key, value in state.items() if key in own and value.ndim == own[key].ndim + 1
               and value.shape[1:] == own[key].shape and value.shape[0] > 1]
    if stacked:
        raise ValueError(f'{name} is of an expanded model, and this one is plain: {stacked[0]} is '
                         f'{tuple(state[stacked[0]].shape)} there and {tuple(own[stacked[0]].shape)} here. '
                         f'`python tools/fuse.py CHECKPOINT OUT` makes the plain weights of it')


def _check(report: LoadReport, own: dict, strict: bool, name: str) -> None:
    backbone = [key for key in own if key.startswith('backbone.')]
    found = sum(key.startswith('backbone.') for key in report.matched)
    if not report.matched or 2 * found < len(backbone):
        raise ValueError(f'{name} holds the weights of another model: {len(report.matched)} of {len(own)} tensors '
                         f'match. Expected keys such as {_some(list(own))}; found {_some(report.unexpected)}')
    if strict and (report.missing or report.unexpected):
        raise ValueError(f'{name} does not fit the model: {report}')


def _some(keys: list[str], count: int = 6) -> str:
    return ', '.join(keys[:count]) + (f', … ({len(keys)} in all)' if len(keys) > count else '') or 'nothing'
