"""Plain weights from elsewhere: rename tables as data, one loader, one report."""
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmengine.logging import print_log
from torch import Tensor, nn

from ewa3d.checks import some
from ewa3d.registry import nearest

__all__ = ['LAYOUTS', 'Layout', 'LoadReport', 'is_pretraining', 'layouts_of', 'load_plain', 'num_outputs', 'rename',
           'squeezed', 'stacked_keys', 'state_dict_of']


class Layout(NamedTuple):
    """How a project names and nests the weights of one kind of model.

    ``renames`` are prefixes there and here, with ``*`` for a number, ``inner`` parts of what follows a renamed prefix,
    in this order. A state dict is of the layout where all of ``marks`` begin some key and ``absent`` begins none
    (prefixes there, or such of ours that have none there).
    """
    kind: str
    task: str
    renames: tuple[tuple[str, str], ...]
    marks: tuple[str, ...]
    absent: tuple[str, ...] = ()
    entry: str = 'base_model'
    inner: tuple[tuple[str, str], ...] = ()


def _at(there: str, here: str, table: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((there + name, here + ours) for name, ours in table)


# Names there are those of the projects' released files.
_ENCODER = (('encoder.', 'tokenizer.encoder.'), ('reduce_dim.', 'tokenizer.reduce_dim.'),
            ('pos_embed.', 'tokenizer.pos_embed.'), ('blocks.blocks.', 'blocks.'), ('norm.', 'norm.'),
            ('cls_token', 'cls_token'), ('cls_pos', 'cls_pos'))
_CLASSIFIER = (*_at('', 'backbone.', _ENCODER), ('cls_head_finetune.', 'head.layers.'))
_MASKED = (*_at('', 'backbone.', _ENCODER), ('mask_token', 'mask_token'), ('lm_head.', 'lm_head.'),
           ('cls_head.', 'cls_head.'))  # Point-BERT's transformer while it pretrains
_PARTS = (*_at('', 'backbone.', _ENCODER), *_at('', 'neck.', tuple((name, name) for name in (
    'label_conv.', 'propagation_', 'dgcnn_pro_'))))
_MAE_PARTS = (*_PARTS, ('convs1.', 'head.layers.0.'), ('bns1.', 'head.layers.1.'), ('convs2.', 'head.layers.4.'),
              ('bns2.', 'head.layers.5.'), ('convs3.', 'head.layers.7.'))
_MLP_LAYERS = (('conv.', 'mlp_convs.*.'), ('bn.bn.', 'mlp_bns.*.'))
_DETR_BLOCK = (('self_attn.in_proj_', 'attn.qkv.'), ('self_attn.out_proj.', 'attn.proj.'), ('norm1.', 'norm1.'),
               ('linear1.', 'mlp.fc1.'), ('linear2.', 'mlp.fc2.'))
_DETR = (*_at('pre_encoder.mlp_module.layer*.', 'backbone.tokenizer.', _MLP_LAYERS),
         *_at('encoder.interim_downsampling.mlp_module.layer*.', 'backbone.downsample.', _MLP_LAYERS),
         *_at('encoder.layers.*.', 'backbone.blocks.*.', (*_DETR_BLOCK, ('norm2.', 'norm2.'))),
         ('encoder_to_decoder_projection.layers.', 'neck.project.'), ('pos_embedding.', 'neck.pos_embed.'),
         ('query_projection.layers.', 'neck.query_embed.'),
         *_at('decoder.layers.*.', 'neck.blocks.*.', (
             *_DETR_BLOCK, ('multihead_attn.in_proj_', 'cross.qkv.'), ('multihead_attn.out_proj.', 'cross.proj.'),
             ('norm2.', 'norm_cross.'), ('norm3.', 'norm2.'))), ('decoder.norm.', 'neck.norm.'),
         *((f'mlp_heads.{name}_head.layers.', f'head.{name}_head.') for name in (
             'sem_cls', 'center', 'size', 'angle_cls', 'angle_residual')))
_BERT_PARTS = (*_PARTS, ('conv1.', 'head.layers.0.'), ('bn1.', 'head.layers.1.'), ('conv2.', 'head.layers.4.'))

LAYOUTS: dict[str, Layout] = {
    'point_mae': Layout('point-mae', 'classifier', _CLASSIFIER, ('blocks.blocks.', 'cls_head_finetune.'),
                        ('reduce_dim.', 'neck.')),
    'point_mae_pretrain': Layout('point-mae', 'pretrain', (
        *_at('MAE_encoder.', 'backbone.', _ENCODER), ('mask_token', 'mask_token'), ('MAE_decoder.', 'decoder.'),
        ('decoder_pos_embed.', 'decoder_pos_embed.'), ('increase_dim.0.', 'increase_dim.')),
        ('MAE_encoder.blocks.blocks.', 'MAE_decoder.', 'increase_dim.0.')),
    'point_mae_partseg': Layout('point-mae', 'part-segmentation', _MAE_PARTS, (
        'blocks.blocks.', 'label_conv.', 'propagation_0.'), ('reduce_dim.',), 'model_state_dict'),
    'point_bert': Layout('point-bert', 'classifier', _CLASSIFIER, (
        'blocks.blocks.', 'cls_head_finetune.', 'reduce_dim.'), ('neck.',)),
    'point_bert_pretrain': Layout('point-bert', 'pretrain', (
        *_at('transformer_q.', '', _MASKED), *_at('transformer_k.', 'momentum.', _MASKED), ('dvae.', 'dvae.'),
        ('queue', 'queue')), ('transformer_q.blocks.blocks.', 'transformer_q.lm_head.')),
    'point_bert_partseg': Layout('point-bert', 'part-segmentation', _BERT_PARTS, (
        'blocks.blocks.', 'reduce_dim.', 'dgcnn_pro_1.', 'propagation_0.'), entry='model_state_dict'),
    'zeroi2v': Layout('zeroi2v', 'classifier', (
        *_at('backbone.', 'backbone.', (
            ('transformer.resblocks.', 'blocks.'), ('class_embedding', 'cls_token'), ('conv1.', 'patch_embed.proj.'),
            ('positional_embedding', 'pos_embed'), ('temporal_embedding', 'temporal_embed'), ('ln_pre.', 'norm_pre.'),
            ('ln_post.', 'norm.'))),
        ('cls_head.fc_cls.', 'head.layers.0.')), ('backbone.transformer.resblocks.', 'backbone.temporal_embedding'),
        entry='state_dict', inner=(
            ('ln_1.', 'norm1.'), ('ln_2.', 'norm2.'), ('attn.in_proj_', 'attn.qkv.'), ('attn.out_proj.', 'attn.proj.'),
            ('mlp.c_fc.', 'mlp.fc1.'), ('mlp.c_proj.', 'mlp.fc2.'), ('T_Adapter_in.', 'attn.qkv.adapter.'),
            ('S_Adapter.', 'attn.proj.adapter.'), ('MLP_Adapter_out.', 'mlp.fc2.adapter.'),
            ('MLP_Adapter.', 'mlp.fc1.adapter.'), ('D_fc1.', 'down.'), ('D_fc2.', 'up.'))),
    'dvae': Layout('dvae', 'tokenizer', tuple((name, name) for name in (
        'encoder.', 'dgcnn_1.', 'codebook', 'dgcnn_2.', 'decoder.')), ('codebook', 'dgcnn_1.', 'dgcnn_2.')),
    '3detr': Layout('3detr', 'detection', _DETR, (
        'pre_encoder.mlp_module.layer0.conv.', 'encoder.layers.0.self_attn.in_proj_',
        'decoder.layers.0.multihead_attn.in_proj_', 'mlp_heads.sem_cls_head.layers.'), entry='model'),
    # To the names of a timm ViT whose blocks are expanded to RePaFFN: both branches hold their norms there. The layer
    # norm before attention has an eps of 1e-5 there, those before and after the blocks 1e-6.
    'repavit': Layout('repavit', 'classifier', tuple((f'blocks.*.{there}', f'blocks.*.{here}') for there, here in (
        ('attn.norm.', 'norm1.'), ('mlp.norm1.', 'norm2.'), ('mlp.norm2.', 'mlp.norm.'))),
        ('blocks.0.attn.norm.', 'blocks.0.mlp.norm1.', 'patch_embed.'), entry='model'),
    # One S4D layer by itself.
    's4d': Layout('s4d', 'mixer', (('D', 'D'), ('kernel.', 'kernel.'), ('output_linear.0.', 'output_linear.')),
                  ('D', 'kernel.log_A_real', 'output_linear.0.'), entry='model'),
}
# timm's models, whose names are those of our blocks: a classifier and the rest.
_TIMM = (('head.', 'head.layers.0.'), ('', 'backbone.'))
# 1×1 convolutions there are linear layers here: the number of dimensions of their weights there.
_CONVOLUTIONS = ((r'encoder\.(first|second)_conv\.[03]', 3), (r'increase_dim\.0', 3),
                 (r'dgcnn_[12]\.(input_trans|layer5\.0)', 3), (r'dgcnn_[12]\.layer[1-4]\.0', 4),
                 (r'decoder\.final_conv\.[036]', 3), (r'label_conv\.0', 3), (r'propagation_[012]\.mlp_convs\.\d+', 3),
                 (r'dgcnn_pro_[12]\.layer[12]\.0', 4), (r'convs?[123]', 3),
                 (r'(pre_encoder|interim_downsampling)\.mlp_module\.layer\d+\.conv', 4),
                 (r'(\w+_projection|mlp_heads\.\w+)\.layers\.\d+', 3), (r'output_linear\.0', 3))
# Embeddings without batch dimension there: the number of dimensions that they have.
_EMBEDDINGS = (('class_embedding', 1), ('positional_embedding', 2))
# What pretraining models have beside the backbone; of their checkpoints only that goes into a task model.
_PRETRAINING = ('mask_token', 'decoder_pos_embed.', 'decoder.', 'increase_dim.', 'lm_head.', 'cls_head.', 'dvae.',
                'momentum.', 'queue')
_CLASS_TOKEN = ('backbone.cls_token', 'backbone.cls_pos')  # Point-MAE pretrains without
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
                lines.append(f'{len(keys)} {title}: {some(keys)}')
        return '; '.join(lines)


def rename(state: Mapping[str, Tensor], layout: str, reverse: bool = False) -> dict[str, Tensor]:
    """``state`` with the keys of this package, or with ``reverse`` the keys and shapes of the layout's own project.

    Keys that the table does not name are kept (``reverse``: left out).

    Raises:
        KeyError: an unknown layout.
    """
    if layout not in LAYOUTS:
        raise KeyError(f'{layout!r} is no known weight layout; {nearest(layout, LAYOUTS)}')
    renamed = {}
    for key, value in state.items():
        name = _renamed(key, LAYOUTS[layout], reverse)
        if name is not None:
            renamed[name] = _as_there(name, value) if reverse else value
        elif not reverse:
            renamed[key] = value
    return renamed


def _renamed(key: str, layout: Layout, reverse: bool = False) -> str | None:
    """``key`` with the first prefix that fits replaced, and what is behind it, or ``None`` where none does."""
    for there, here in layout.renames:
        old, new = (here, there) if reverse else (there, here)
        if '*' not in old:
            if key.startswith(old):
                return new + _inner(key[len(old):], layout.inner, reverse)
        elif found := re.match(re.escape(old).replace(r'\*', r'(\d+)'), key):
            return new.replace('*', found[1]) + key[found.end():]
    return None


def _inner(rest: str, pairs: tuple[tuple[str, str], ...], reverse: bool) -> str:
    for there, here in reversed(pairs) if reverse else pairs:
        rest = rest.replace(here, there) if reverse else rest.replace(there, here)
    return rest


def _as_there(name: str, value: Tensor) -> Tensor:
    for pattern, ndim in _CONVOLUTIONS if value.ndim > 1 else ():  # norms have numbers beside those of convolutions
        if re.search(rf'(^|\.){pattern}\.weight$', name):
            return value.reshape(*value.shape, *[1] * (ndim - value.ndim))
    for pattern, ndim in _EMBEDDINGS:
        if name.endswith(pattern):
            return value.reshape(value.shape[-ndim:])
    return value


def squeezed(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` in the shapes of ``own`` where they differ by dimensions of one alone: the weights of 1×1 convolutions
    as those of linear layers, an embedding without its batch dimension."""
    def fit(key: str, value: Tensor) -> Tensor:
        same = key in own and [n for n in value.shape if n != 1] == [n for n in own[key].shape if n != 1]
        return value.reshape(own[key].shape) if same else value
    return {key: fit(key, value) for key, value in state.items()}


def layouts_of(state: Mapping, reverse: bool = False) -> list[str]:
    """The layouts that the keys of ``state`` are of; with ``reverse``, those that it can be renamed to."""
    def begins(mark: str, layout: Layout) -> bool:
        mark = (_renamed(mark, layout) or mark) if reverse else mark
        return any(key.startswith(mark) for key in state)
    return [name for name, layout in LAYOUTS.items() if all(begins(mark, layout) for mark in layout.marks)
            and not any(begins(mark, layout) for mark in layout.absent)]


def is_pretraining(state: Mapping) -> bool:
    """Whether the keys, ours, are those of a model that pretrains a backbone."""
    return 'mask_token' in state


def load_plain(model: nn.Module, source: str | Path | Mapping, strict: bool | str = True,
               skip_head: bool | str = False, name: str | None = None,
               parts: Sequence[str] | None = None) -> LoadReport:
    """Load plain weights into ``model``: ours, or those of a known project (recognised by their names).

    Of a pretraining model's weights, a task model takes the backbone; the rest is reported as skipped. Blocks of a ViT
    fit into a point transformer, and the other way round: ``parts``.

    Args:
        source: a checkpoint's path, or its content.
        strict: raise where the model lacks a tensor or the checkpoint has one that the model has no place for. Without
            it, such tensors are reported, and at least half of the backbone must be found. ``'transfer'`` is as strict,
            but allows a pretraining model's weights to lack the head and the class token.
        skip_head: leave the head as it is: ``True``, or ``'mismatched'`` where it is of another form or shape.
        name: what to call the source in messages; by default its path.
        parts: load these parts of the model alone, e.g. ``['backbone.blocks', 'backbone.norm']``; all of each must be
            there, and with ``strict`` nothing more of it in the source. The rest is reported as skipped.

    Returns:
        a :class:`LoadReport`; it is logged as well where something may have been left out.

    Raises:
        FileNotFoundError, ValueError: no such file, not a checkpoint, weights of another model (nothing is loaded), a
            part that the model or the source does not have.
        TypeError: ``parts`` is one string.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else 'the given weights')
    state = state_dict_of(source, name)
    own = model.state_dict()
    layout, state = _recognise(state, own)
    state, extras = _without_pretraining(state, own)
    if parts is not None:
        return _load_parts(model, state, layout, parts, strict, name)
    partial = not strict or (strict == 'transfer' and bool(extras))
    state, skipped = _without_head(state, own, skip_head, name)
    matched = [key for key in own if key in state]
    missing = [key for key in own if key not in state and key not in skipped]
    unexpected = [key for key in state if key not in own]
    report = LoadReport(layout, matched, missing, unexpected, skipped + extras)
    _refuse_expanded(state, own, name)
    _check(report, own, strict, name)
    backup = {key: own[key].clone() for key in matched}
    try:
        model.load_state_dict({key: state[key] for key in matched}, strict=False)
    except RuntimeError as error:
        model.load_state_dict(backup, strict=False)
        raise ValueError(f'{name} has other shapes than the model: {" ".join(str(error).split())}') from None
    if partial:
        print_log(f'{name}: {report}', logger='current')
    return report


def _load_parts(model: nn.Module, state: dict, layout: str, parts: Sequence[str], strict: bool | str,
                name: str) -> LoadReport:
    """The tensors of some parts of ``model``, all of them."""
    if isinstance(parts, str):
        raise TypeError(f"parts is a list of names such as ['backbone.blocks'], got the string {parts!r}")
    own = model.state_dict()
    _refuse_expanded(state, own, name)
    chosen = {part: [key for key in own if key == part or key.startswith(f'{part}.')] for part in parts}
    for part, keys in chosen.items():
        if not keys:
            raise ValueError(f'{name}: the model has no part {part!r}; '
                             f'{nearest(part, {key.rpartition(".")[0] for key in own} | {*own})}')
    wanted = [key for keys in chosen.values() for key in keys]
    missing = [key for key in wanted if key not in state]
    other = [key for key in wanted if key in state and state[key].shape not in (own[key].shape, own[key].shape[1:])]
    if missing or other:
        shapes = some((f'{key} {tuple(state[key].shape)}, the model {tuple(own[key].shape)}' for key in other), 3)
        raise ValueError(f'{name} does not fit {", ".join(parts)}: missing: {some(missing, 4)}; of another shape: '
                         f'{shapes}')
    unexpected = [key for key in state if key not in own and key.startswith(tuple(f'{part}.' for part in parts))]
    if unexpected and strict:
        biases = any(key.endswith('qkv.bias') for key in unexpected)
        hint = 'qkv_bias=True in the backbone makes a place for biases, ' if biases else ''
        raise ValueError(f'{name} has {some(unexpected, 4)}, the model has no place for them, and without them it '
                         f'would compute something else; {hint}strict=False leaves them out')
    model.load_state_dict({key: state[key] for key in wanted}, strict=False)
    untouched = [key for key in own if key not in wanted]
    skipped = [key for key in state if key not in wanted and key not in unexpected]
    report = LoadReport(layout, wanted, untouched, unexpected, skipped)
    print_log(f'{name}: {report}', logger='current')
    return report


def num_outputs(checkpoint: Mapping) -> int | None:
    """The rows of the head's last layer in a checkpoint of ours or of a known project: how many classes it tells."""
    state = state_dict_of(checkpoint, 'the checkpoint')
    for weights in (state, *(rename(state, layout) for layout in layouts_of(state))):
        if 'head.sem_cls_head.8.weight' in weights:  # a detector's, with one more output for "no object"
            return int(weights['head.sem_cls_head.8.weight'].shape[0]) - 1
        layers = [key for key, value in weights.items() if key.startswith('head.') and value.ndim > 1]
        if layers:  # safetensors sorts names as text: layer 10 before layer 2
            last = sorted(layers, key=lambda key: [int(number) for number in re.findall(r'\d+', key)])[-1]
            return int(weights[last].shape[0])
    return None


def state_dict_of(source: str | Path | Mapping, name: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint, wherever projects nest them, without the prefix of a parallel wrapper.

    Raises:
        FileNotFoundError, ValueError: no such file, not a checkpoint, no tensors in it, keys that are no names.
    """
    if isinstance(source, (str, Path)):
        from ewa3d.engine.checkpoint import read_checkpoint
        source = read_checkpoint(source)
    for key in _NESTED:
        if isinstance(source.get(key), Mapping):
            source = source[key]
            break
    odd = [key for key in source if not isinstance(key, str)]
    if odd:
        raise ValueError(f'{name} has the key {odd[0]!r} among its weights; names (strings) were expected')
    state = {key.removeprefix('module.'): value for key, value in source.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f'{name} holds no tensors; found the keys {some(source)}')
    return state


def _recognise(state: dict, own: dict) -> tuple[str, dict]:
    """The layout under which most keys are the model's, and the state as that layout's names and shapes are here."""
    likely = layouts_of(state)

    def by_layout(state: dict) -> dict[str, dict]:
        return {'ewa3d': state, **{layout: rename(state, layout) for layout in (*likely, *LAYOUTS)},
                'timm': {_begun_otherwise(key, _TIMM): value for key, value in state.items()}}
    # What only pretraining has does not count: a decoder's norm there is not that of 3DETR's decoder.
    counted = by_layout(_without_pretraining(state, own)[0])
    best = max(counted, key=lambda layout: sum(key in own for key in counted[layout]))
    return best, _for_each_modality(squeezed(by_layout(state)[best], own), own)


def _begun_otherwise(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    """``key`` with the first of the beginnings that it has replaced."""
    return next((new + key[len(old):] for old, new in renames if key.startswith(old)), key)


def _for_each_modality(state: dict, own: dict) -> dict:
    """A norm there for each of the norms that modalities have here: ``norm1.weight`` for ``norm1.img.weight``."""
    state, used = dict(state), set()
    for key in own:
        *path, _, leaf = key.split('.') if key.count('.') > 1 else (key, '', '')
        plain = '.'.join([*path, leaf])
        if key not in state and plain in state and plain not in own and state[plain].shape == own[key].shape:
            state[key] = state[plain]
            used.add(plain)
    return {key: value for key, value in state.items() if key not in used}


def _without_pretraining(state: dict, own: dict) -> tuple[dict, list[str]]:
    if is_pretraining(own) or not is_pretraining(state):
        return state, []
    extras = [key for key in state if key.startswith(_PRETRAINING)]
    return {key: value for key, value in state.items() if key not in extras}, extras


def _without_head(state: dict, own: dict, skip_head: bool | str, name: str) -> tuple[dict, list[str]]:
    head = [key for key in state if key.startswith('head.')]
    differing = [key for key in head if key in own and state[key].shape != own[key].shape]
    if differing and not skip_head:
        key = differing[-1]
        raise ValueError(f"{name}: the head's {key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)} "
                         '(another number of classes?); skip_head=True leaves the head as it is')
    if skip_head is True or (skip_head and (differing or not own.keys() >= set(head))):
        return {key: value for key, value in state.items() if key not in head}, \
            sorted({*head, *(key for key in own if key.startswith('head.'))})
    return state, []


def stacked_keys(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """The keys of ``state`` that are stacked experts where the model, of the tensors ``own``, is plain: plain names
    and one leading dimension."""
    return [key for key, value in state.items() if key in own and value.ndim == own[key].ndim + 1
            and value.shape[1:] == own[key].shape and value.shape[0] > 1]


def _refuse_expanded(state: dict, own: dict, name: str) -> None:
    stacked = stacked_keys(state, own)
    if stacked:
        raise ValueError(f'{name} is of an expanded model, and this one is plain: {stacked[0]} is '
                         f'{tuple(state[stacked[0]].shape)} there and {tuple(own[stacked[0]].shape)} here. '
                         f'`python tools/fuse.py CHECKPOINT OUT` makes the plain weights of it')


def _check(report: LoadReport, own: dict, strict: bool | str, name: str) -> None:
    backbone = [key for key in own if key.startswith('backbone.') and '.adapter.' not in key]  # plain weights have none
    found = sum(key in backbone for key in report.matched)
    if not report.matched or 2 * found < len(backbone):
        raise ValueError(f'{name} holds the weights of another model: {len(report.matched)} of {len(own)} tensors '
                         f'match. Expected keys such as {some(own)}; found {some(report.unexpected)}')
    lacking = report.missing
    if strict == 'transfer' and report.skipped:
        lacking = [key for key in lacking if key.startswith('backbone.') and key not in _CLASS_TOKEN]
    if strict and (lacking or report.unexpected):
        raise ValueError(f'{name} does not fit the model: {report}')
