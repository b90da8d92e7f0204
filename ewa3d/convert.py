"""Official checkpoints to files of ours, and back: the same tensors under other names and in other shapes."""
import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from ewa3d.checks import some
from ewa3d.engine.checkpoint import (
    SUFFIXES,
    check_target,
    read_checkpoint,
    save_torch,
    select_weights,
    write_checkpoint,
)
from ewa3d.engine.plain import storable
from ewa3d.layers.experts import expert_mean
from ewa3d.models.official import KINDS, WrongModelError, any_heads, check_kind, model_config, official_layout
from ewa3d.models.weights import LAYOUTS, layouts_of, rename, squeezed, stacked_keys, state_dict_of
from ewa3d.registry import MODELS

__all__ = ['ConvertReport', 'convert_checkpoint']

# The constants of the official code; files of other sizes need the same change there.
_FIXED = dict(widths=(128, 256, 512), pos_dim=128, mlp_ratio=4., qkv_bias=False, in_channels=3, hidden=256,
              encoder_widths=(128, 256, 512), graph_widths=(128, 256, 512, 512, 1024), decoder_widths=(1024, 512))
_PARTS = dict(num_categories=16, num_parts=50, out_indices=(3, 7, 11))
_FIXED_PARTS = {'point_mae_partseg': dict(_PARTS, hidden=(512, 256), propagation_dim=1024, category_dim=64),
                'point_bert_partseg': dict(_PARTS, hidden=(128,), graph_dim=512, fps_levels=(512, 256))}
_FORMS = {'point_mae': 'mlp', 'point_bert': 'mlp_nobn'}
# What the official models compute and weights do not show: where our config says something else, the file would lie.
_FUNCTION = {'backbone.pos': 'every', 'backbone.norm_eps': 1e-5, 'neck.mode': 'cls+max',
             'backbone.mask_radius_compat': True}
_FUNCTION_3DETR = {'backbone.tokenizer.radius': 0.2, 'backbone.tokenizer.num_neighbors': 64,
                   'backbone.downsample.radius': 0.4, 'backbone.downsample.num_neighbors': 32}


@dataclass
class ConvertReport:
    """What :func:`convert_checkpoint` did; ``str()`` is what the command prints. Keys are those of ewa3d."""
    source: Path
    out: Path
    what: str = ''
    sizes: dict = field(default_factory=dict)
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str = ''

    @property
    def written(self) -> bool:
        """Whether there is a file."""
        return not self.refused

    def __str__(self) -> str:
        lines = [f'{self.source}: {self.what}'] if self.what else []
        if self.sizes:
            lines.append('sizes: ' + ', '.join(f'{key}={value}' for key, value in self.sizes.items()))
        if self.what:
            lines += [f'matched: {len(self.matched)} tensors', f'missing: {some(self.missing, 20)}',
                      f'unexpected: {some(self.unexpected, 20)}']
        return '\n'.join([*lines, *self.notes, f'wrote {self.out}' if self.written else
                          f'refused to write {self.out}: {self.refused}'])


def convert_checkpoint(kind: str, source: str | Path, out: str | Path, to_official: bool = False,
                       weights: str = 'default') -> ConvertReport:
    """Write an official checkpoint as one of ours or, with ``to_official``, the other way round.

    Tensors keep their values and types bit for bit; experts of a model in training are averaged on the way out. What
    the file is of, and its sizes, are read from the weights. Nothing is written where the file is of another model.

    Args:
        kind: ``'point-mae'``, ``'point-bert'``, ``'dvae'`` or ``'3detr'``; ``'point-bert'`` takes its dVAE as well.
        source: the file to read.
        out: ``*.pth`` or ``*.safetensors``; ``*.pth`` for official files, which nothing else reads.
        weights: with ``to_official``: ``'default'``, ``'ema'`` or ``'raw'``, see
            :func:`ewa3d.engine.checkpoint.select_weights`.

    Raises:
        FileNotFoundError, ValueError: no such file, no checkpoint, an unknown kind, another suffix, tensors of
            inconsistent shapes.
    """
    source, out = Path(source), check_target(out, source, SUFFIXES[:1] if to_official else SUFFIXES)
    check_kind(kind)
    report = ConvertReport(source, out)
    try:
        if to_official:
            _to_official(kind, report, weights)
        else:
            _from_official(kind, report)
    except WrongModelError as error:
        report.refused = str(error)
    return report


def _from_official(kind: str, report: ConvertReport) -> None:
    content = read_checkpoint(report.source)
    state = state_dict_of(content, str(report.source))
    layout = official_layout(kind, state, str(report.source))
    state = _compare(report, layout, rename(state, layout))
    if not report.refused:
        official = dict(kind=LAYOUTS[layout].kind, task=LAYOUTS[layout].task, layout=layout,
                        source=report.source.name, sizes=report.sizes)
        if layout == '3detr' and isinstance(content.get('args'), argparse.Namespace):  # what its weights do not tell
            official['args'] = {key: value for key, value in vars(content['args']).items()
                                if value is None or isinstance(value, (str, int, float))}
        write_checkpoint(report.out, state, dict(weights='raw', official=official))


def _to_official(kind: str, report: ConvertReport, weights: str) -> None:
    content = read_checkpoint(report.source)
    state, which = select_weights(content, weights)
    state = state_dict_of(state, str(report.source))
    layout = _own_layout(kind, state, str(report.source))
    state = _compare(report, layout, state)
    report.notes.insert(0, f'weights: {which}')
    _tell_differences(report, layout, content.get('meta'))
    if report.missing or report.unexpected:
        report.refused = report.refused or 'the official code loads strictly, and these are not exactly its tensors'
    if not report.refused:
        official = {LAYOUTS[layout].entry: storable(rename(state, layout, reverse=True), 'state_dict')}
        stored = _part(content, 'meta', 'official', 'args')
        if stored:
            official['args'] = argparse.Namespace(**stored)
        save_torch(report.out, official)


def _own_layout(kind: str, state: Mapping[str, Tensor], name: str) -> str:
    """The layout of ``kind`` that a model of ours can be renamed to."""
    found = [layout for layout in layouts_of(state, reverse=True) if layout in KINDS[kind]]
    if len(found) == 1:
        return found[0]
    theirs = layouts_of(state)
    what = f'{LAYOUTS[theirs[0]].kind} {LAYOUTS[theirs[0]].task} weights with official names already' if theirs else \
        'no model of ewa3d that has an official counterpart of this kind'
    raise WrongModelError(f'{name} holds {what}; {kind} has {", ".join(LAYOUTS[x].task for x in KINDS[kind])}; found '
                          f'keys such as {some(state)}')


def _compare(report: ConvertReport, layout: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of ``state`` that the model has, plain and shaped as there; fills in the report.

    Raises:
        ValueError: a tensor's shape is not that which the file's other tensors ask for.
    """
    config, report.sizes = model_config(layout, state, str(report.source), any_heads(layout))
    report.what = f'{LAYOUTS[layout].kind} {LAYOUTS[layout].task}'
    own = MODELS.build(config).state_dict()
    state = squeezed(state, own)
    stacked = stacked_keys(state, own)
    if stacked:
        state.update({key: expert_mean(state[key]) for key in stacked})
        report.notes.append(f'experts averaged: {len(stacked)} tensors')
    report.matched = [key for key in own if key in state]
    report.missing = [key for key in own if key not in state]
    report.unexpected = [key for key in state if key not in own]
    wrong = [f'{key} is {tuple(state[key].shape)} instead of {tuple(own[key].shape)}' for key in report.matched
             if state[key].shape != own[key].shape]
    if wrong:
        raise ValueError(f'{report.source}: its tensors do not fit each other: {some(wrong)}')
    return {key: state[key] for key in report.matched}


def _tell_differences(report: ConvertReport, layout: str, meta: Mapping | None) -> None:
    """Refuse where the official model would compute something else, note what its code or config has to be told."""
    form, expected = report.sizes.get('form'), _FORMS.get(layout)
    if form != expected:
        report.refused = f'the official classifier has the head form {expected!r}, this model {form!r}'
    has_token = layout == 'point_bert_partseg'
    if layout in _FIXED_PARTS and report.sizes['cls_token'] != has_token:
        report.refused = f'the official part segmentation has {"a" if has_token else "no"} class token '\
                         f'(cls_token={has_token}), this model has it otherwise'
    model, tokenizer = (_part(meta, 'cfg', 'model', *rest) for rest in ((), ('backbone', 'tokenizer')))
    for path, expected in {**_FUNCTION, **(_FUNCTION_3DETR if layout == '3detr' else {})}.items():
        *part, name = path.split('.')
        value = _part(model, *part).get(name, expected)
        if value != expected:
            report.refused = f'the model was trained with {path}={value!r}, and the official code has {expected!r}'
    if model and not tokenizer.get('skip_origin', False):
        report.notes.append('the official sampling of centres leaves out points near the origin; this model was '
                            'trained without that rule (skip_origin=False)')
    neck = _part(model, 'neck')
    sizes = {**report.sizes, **{key: tuple(neck[key]) for key in ('out_indices', 'fps_levels') if neck.get(key)}}
    fixed = {**_FIXED, **_FIXED_PARTS.get(layout, {}), 'propagation_hidden': 4 * sizes.get('embed_dim', 0)}
    if layout == '3detr':
        width = sizes['embed_dim']
        fixed = dict(widths=(64, 128, width), downsample_widths=(256, 256, width) if sizes['downsample_widths'] else ())
    odd = [f'{key}={sizes[key]}' for key, value in fixed.items() if sizes.get(key, value) != value]
    if odd:
        report.notes.append(f'the official code fixes sizes, which have to be changed there: {", ".join(odd)}')
    told = {**tokenizer, **_part(model, 'backbone'), **model}
    if layout == '3detr':
        told.update({key: neck[name] for key, name in (('decoder_num_heads', 'num_heads'),
                                                       ('num_queries', 'num_queries')) if name in neck})
    asked = [f'{key}={told[key]}' for key in ('num_heads', 'decoder_num_heads', 'num_groups', 'group_size',
                                              'num_points', 'num_queries') if key in told]
    if asked:
        report.notes.append(f'the official config has to say: {", ".join(asked)}')


def _part(tree, *keys: str) -> Mapping:
    """``tree[key][key]…`` where that is a dict; an empty one otherwise."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}
