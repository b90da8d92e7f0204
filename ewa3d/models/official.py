"""Models around official checkpoints: which model a file is of, and how large, is read from its weights.

An entry of ``_TASKS`` says for one layout what the weights tell (``read``), what they cannot tell (``defaults``, those
of the official configs) and the config of the model of these sizes.
"""
import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ewa3d.checks import check_integer, some
from ewa3d.models.detection.official import DETR_DEFAULTS, detr_config, read_detr, stored_detr
from ewa3d.models.dvae import FOLD
from ewa3d.models.weights import LAYOUTS, layouts_of, load_plain, rename, state_dict_of
from ewa3d.registry import MODELS, nearest

__all__ = ['KINDS', 'WrongModelError', 'check_kind', 'from_official', 'model_config', 'official_layout']

KINDS = {kind: [name for name, layout in LAYOUTS.items() if layout.kind in (kind, *more)]
         for kind, more in {'point-mae': (), 'point-bert': ('dvae',), 'dvae': (), '3detr': ()}.items()}
_FORMS = {(0, 1, 4, 5, 8): 'mlp', (0, 3): 'mlp_nobn', (0,): 'linear'}
# What the official configs call our sizes.
_OFFICIAL_NAMES = dict(preenc_npoints=('num_points',), nqueries=('num_queries',), enc_nhead=('num_heads',),
                       dec_nhead=('decoder_num_heads',), enc_dropout=('proj_drop',), dec_dropout=('decoder_proj_drop',),
                       mlp_dropout=('head_dropout',), enc_activation=('act_layer',), enc_dim=('embed_dim',),
                       dec_dim=('decoder_dim',), enc_nlayers=('depth',), dec_nlayers=('decoder_depth',),
                       num_group=('num_groups',), trans_dim=('embed_dim',), encoder_dims=('encoder_dim',),
                       cls_dim=('num_classes', 'num_parts'), tokens_dims=('token_dim',), decoder_dims=('decoder_dim',),
                       m=('key_momentum',), T=('temperature',), K=('queue_size',), num_part=('num_parts',),
                       fetch_idx=('out_indices',))


class WrongModelError(ValueError):
    """A file holds the weights of another model than was asked for."""


def from_official(kind: str, path: str | Path, **sizes) -> nn.Module:
    """The model of an official checkpoint, with its weights, in eval mode.

    Task, width, depth, classes and the like are read from the weights, the rest from the arguments that the file
    stores, if it does. The model samples centres by the rule of the official kernel, takes points as they are given
    (official pipelines normalise before), and its ``backbone``, which :func:`ewa3d.expand` works on, is a
    :class:`~ewa3d.models.backbone.TokenEncoder` or, of 3DETR, a
    :class:`~ewa3d.models.detection.encoder.SetEncoder`.

    Args:
        kind: ``'point-mae'``, ``'point-bert'``, ``'dvae'`` (Point-BERT's tokenizer) or ``'3detr'``, which
            :func:`~ewa3d.models.detection.official.read_detr` tells more about.
        path: a file of the project; nothing in it is executed.
        **sizes: what weights cannot tell, with the official defaults: ``num_heads=6``, ``num_groups=64``,
            ``group_size=32``; for part segmentation ``num_groups=128``, ``out_indices=(3, 7, 11)``, Point-BERT's
            ``fps_levels=(512, 256)`` and ``parts``, category → part numbers, to which predictions are then restricted
            (:class:`~ewa3d.models.partseg.PartSegHead`); for pretraining models ``decoder_num_heads`` (by default those
            of the encoder), ``mask_ratio``, ``key_momentum`` and so on; an unknown name is answered with the valid
            ones. The names of the official configs will do as well. Sizes that the weights tell may be given to be
            checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an unknown kind, a file of another model, a size that the weights contradict, heads that do not
            divide the width, missing or misshapen weights.
        TypeError: a size that the model has not.
    """
    path = Path(path)
    check_kind(kind)
    from ewa3d.engine.checkpoint import read_checkpoint
    content = read_checkpoint(path)
    state = state_dict_of(content, str(path))
    layout = official_layout(kind, state, str(path))
    config, _ = model_config(layout, rename(state, layout), str(path), sizes, stored_sizes(layout, content, str(path)))
    try:
        model = MODELS.build(config)
        if hasattr(getattr(model, 'neck', None), 'out_indices'):
            model.backbone.block_numbers(model.neck.out_indices)
    except (ValueError, TypeError) as error:  # a size out of range
        raise type(error)(f'{path}: {error}') from None
    model.load_report = load_plain(model, state, name=str(path))
    return model.eval()


def check_kind(kind: str) -> None:
    """Raise ``ValueError`` unless there are official weights of this kind."""
    if kind not in KINDS:
        raise ValueError(f'{kind!r} is no kind of official weights; {nearest(kind, KINDS)}')


def official_layout(kind: str, state: Mapping[str, Tensor], name: str) -> str:
    """The layout, one of ``kind``, that the official ``state`` is of.

    Raises:
        WrongModelError: weights of another kind, of none or of several.
    """
    found = layouts_of(state)
    if len(found) == 1 and found[0] in KINDS[kind]:
        return found[0]
    tasks = '; '.join(f'{LAYOUTS[layout].task}: {", ".join(LAYOUTS[layout].marks)}' for layout in KINDS[kind])
    raise WrongModelError(f'{name} holds {_described(found, state)}, not the official weights of {kind}. Expected keys '
                          f'beginning with {tasks}; found {some(dict.fromkeys(map(_beginning, state)), 12)}')


def _described(found: list[str], state: Mapping) -> str:
    if found:
        return ' and '.join(f'{LAYOUTS[layout].kind} {LAYOUTS[layout].task} weights' for layout in found)
    if layouts_of(state, reverse=True):
        return 'weights with the names of ewa3d'
    return 'unknown weights'


def _beginning(key: str) -> str:
    return '.'.join(key.split('.')[:2])


def stored_sizes(layout: str, content: Mapping, name: str) -> dict:
    """What the arguments that a checkpoint stores tell of its model, beyond its weights."""
    stored = content.get('args')
    stored = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    read = _TASKS[layout].stored
    return read(stored, name) if read is not None and isinstance(stored, Mapping) else {}


def any_heads(layout: str) -> dict[str, int]:
    """Numbers of heads that divide every width: no weight depends on them."""
    return {key: 1 for key in _TASKS[layout].defaults if key.endswith('num_heads')}


def model_config(layout: str, state: Mapping[str, Tensor], name: str, given: Mapping | None = None,
                 stored: Mapping | None = None) -> tuple[dict, dict]:
    """The config of the model that ``state``, with our keys, is of, and the sizes that were read from it.

    Args:
        given: sizes that somebody asked for. stored: defaults in place of the official ones.

    Raises:
        ValueError: weights that a size is read from are missing, a given size contradicts the weights, or heads do not
            divide the width.
        TypeError: a given size that the model has not.
    """
    task = _TASKS[layout]
    found = task.read(_Reader(state, layout, name))
    known = {*task.defaults, *found}
    given = {next((name for name in (key, *_OFFICIAL_NAMES.get(key, ())) if name in known), key): value
             for key, value in (given or {}).items()}
    for key, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if key not in known:
            raise TypeError(f'{name}: the model has no size {key!r}; {nearest(key, known)}')
        if key in found and value != found[key]:
            raise ValueError(f'{name}: {key}={value!r} was given, and the weights have {key}={found[key]!r}')
    sizes = {**task.defaults, **(stored or {}), **found, **given}
    for key in [key for key in sizes if key.endswith('num_heads') and sizes[key] is not None]:
        width = sizes.get('decoder_dim', sizes['embed_dim']) if key.startswith('decoder_') else sizes['embed_dim']
        if width % check_integer(f'{name}: {key}', sizes[key], 1):
            raise ValueError(f'{name}: {key}={sizes[key]} does not divide the width of the weights, '
                             f'{width}; give the {key} of the config that they were trained with')
    try:
        return task.config(sizes), found
    except ValueError as error:
        raise ValueError(f'{name}: {error}') from None


# ---------------------------------------------------------------------------------------------------------------------
# What weights tell
# ---------------------------------------------------------------------------------------------------------------------
class _Reader:
    """Sizes of tensors by our names; its errors have the file's names."""

    def __init__(self, state: Mapping[str, Tensor], layout: str, name: str):
        self.state, self.layout, self.name = state, layout, name

    def __contains__(self, key: str) -> bool:
        return key in self.state

    def size(self, key: str, dim: int = 0) -> int:
        """The size of one dimension of a tensor: 0 is what a layer gives, 1 what it takes."""
        if key not in self.state:
            raise ValueError(f'{self.name} lacks {self.there(key)!r}, from which a size is read')
        shape = self.state[key].shape
        if not -len(shape) <= dim < len(shape) or not shape[dim]:
            raise ValueError(f'{self.name}: {self.there(key)!r} has the shape {tuple(shape)}, which tells no size')
        return shape[dim]

    def numbers(self, prefix: str) -> list[int]:
        """The numbers that follow ``prefix`` in the keys."""
        found = {match[1] for key in self.state if (match := re.match(rf'{re.escape(prefix)}(\d+)\.', key))}
        return sorted(map(int, found))

    def depth(self, prefix: str) -> int:
        """The number of blocks under ``prefix``."""
        numbers = self.numbers(prefix)
        if not numbers or numbers != list(range(len(numbers))):
            raise ValueError(f'{self.name}: blocks 0, 1, 2, … were expected at {self.there(prefix)!r}, found '
                             f'{some(numbers)}')
        return len(numbers)

    def mlp_ratio(self, key: str, width: int) -> float:
        """What ``int(width * ratio)`` makes the hidden width of again, given an FFN's first weight."""
        hidden = self.size(key, -2)
        ratio = hidden / width
        return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width

    def there(self, key: str) -> str:
        """What the file calls it."""
        return next(iter(rename({key: Tensor()}, self.layout, reverse=True)), key)


def _widths(read: _Reader, encoder: str) -> tuple[int, ...]:
    return tuple(read.size(f'{encoder}{layer}.weight') for layer in ('first_conv.0', 'first_conv.3', 'second_conv.0'))


def _read_backbone(read: _Reader) -> dict:
    tokenizer, width = 'backbone.tokenizer.', read.size('backbone.norm.weight')
    encoder = tokenizer + 'encoder.'
    return dict(embed_dim=width, depth=read.depth('backbone.blocks.'),
                mlp_ratio=read.mlp_ratio('backbone.blocks.0.mlp.fc1.weight', width),
                qkv_bias='backbone.blocks.0.attn.qkv.bias' in read, cls_token='backbone.cls_token' in read,
                in_channels=read.size(f'{encoder}first_conv.0.weight', 1),
                widths=_widths(read, encoder), encoder_dim=read.size(f'{encoder}second_conv.3.weight'),
                reduce_dim=f'{tokenizer}reduce_dim.weight' in read, pos_dim=read.size(f'{tokenizer}pos_embed.0.weight'))


def _read_classifier(read: _Reader) -> dict:
    layers = tuple(read.numbers('head.layers.'))
    if layers not in _FORMS:
        raise ValueError(f'{read.name}: a head with the layers {" or ".join(map(str, _FORMS))} was expected, found '
                         f'{layers}')
    return dict(_read_backbone(read), form=_FORMS[layers], num_classes=read.size(f'head.layers.{layers[-1]}.weight'),
                hidden=read.size('head.layers.0.weight'))


def _read_mae_parts(read: _Reader) -> dict:
    backbone, label, first = _read_backbone(read), 'neck.label_conv.0.weight', 'neck.propagation_0.mlp_convs.0.weight'
    joined = read.size(first, 1) - backbone['in_channels']
    return dict(backbone, num_outputs=joined // backbone['embed_dim'], num_categories=read.size(label, 1),
                category_dim=read.size(label), propagation_hidden=read.size(first),
                propagation_dim=read.size('neck.propagation_0.mlp_convs.1.weight'),
                hidden=tuple(read.size(f'head.layers.{i}.weight') for i in (0, 4)),
                num_parts=read.size('head.layers.7.weight'))


def _read_bert_parts(read: _Reader) -> dict:
    backbone = _read_backbone(read)
    columns = read.size('neck.propagation_0.mlp_convs.0.weight', 1)
    return dict(backbone, num_outputs=3, num_categories=columns - backbone['embed_dim'] - backbone['in_channels'],
                propagation_hidden=read.size('neck.propagation_0.mlp_convs.0.weight'),
                graph_dim=read.size('neck.dgcnn_pro_1.layer1.0.weight'), hidden=(read.size('head.layers.0.weight'),),
                num_parts=read.size('head.layers.4.weight'))


def _read_dvae(read: _Reader, at: str = '') -> dict:
    layers = ('input_trans', *(f'layer{i}.0' for i in range(1, 5)))
    return dict(group_size=_points(read, f'{at}decoder.mlp.4.weight') * FOLD,
                encoder_dim=read.size(f'{at}encoder.second_conv.3.weight'), num_tokens=read.size(f'{at}codebook'),
                token_dim=read.size(f'{at}codebook', 1), decoder_dim=read.size(f'{at}dgcnn_2.layer5.0.weight'),
                encoder_widths=_widths(read, f'{at}encoder.'),
                graph_widths=tuple(read.size(f'{at}dgcnn_1.{layer}.weight') for layer in layers),
                decoder_widths=(read.size(f'{at}decoder.mlp.0.weight'), read.size(f'{at}decoder.final_conv.0.weight')))


def _read_mae_pretrain(read: _Reader) -> dict:
    backbone = _read_backbone(read)
    return dict(backbone, decoder_depth=read.depth('decoder.blocks.'), group_size=_points(read, 'increase_dim.weight'),
                decoder_mlp_ratio=read.mlp_ratio('decoder.blocks.0.mlp.fc1.weight', backbone['embed_dim']),
                decoder_pos_dim=read.size('decoder_pos_embed.0.weight'))


def _read_bert_pretrain(read: _Reader) -> dict:
    backbone, dvae = _read_backbone(read), _read_dvae(read, 'dvae.')
    labels = read.size('lm_head.weight')
    if labels != dvae['num_tokens']:
        raise ValueError(f'{read.name}: the lm_head tells {labels} codes apart, and the dvae has '
                         f'{dvae["num_tokens"]}')
    return {**dvae, **backbone, 'dvae_encoder_dim': dvae['encoder_dim'], 'cls_dim': read.size('cls_head.0.weight'),
            'queue_size': read.size('queue', 1)}


def _points(read: _Reader, key: str) -> int:
    """How many points a layer gives, three coordinates each."""
    rows = read.size(key)
    if rows % 3:
        raise ValueError(f'{read.name}: {read.there(key)!r} gives {rows} numbers, which are no points of three '
                         'coordinates')
    return rows // 3


# ---------------------------------------------------------------------------------------------------------------------
# Models of these sizes
# ---------------------------------------------------------------------------------------------------------------------
def _backbone(sizes: Mapping) -> dict:
    tokenizer = {key: sizes[key] for key in ('num_groups', 'group_size', 'in_channels', 'widths', 'pos_dim')}
    if sizes['reduce_dim']:
        tokenizer['encoder_dim'] = sizes['encoder_dim']
    blocks = {key: sizes[key] for key in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'qkv_bias', 'cls_token')}
    return dict(type='TokenEncoder', tokenizer=dict(type='PointPatchEmbed', skip_origin=True, **tokenizer), **blocks)


def _classifier(sizes: Mapping) -> dict:
    return dict(type='TaskModel', backbone=_backbone(sizes), neck=dict(type='TokenPool', mode='cls+max'),
                head=dict(type='ClsHead', **{key: sizes[key] for key in ('num_classes', 'form', 'hidden')}))


def _mae_parts(sizes: Mapping) -> dict:
    neck = dict(type='PointFeaturePropagation', hidden=sizes['propagation_hidden'], out_dim=sizes['propagation_dim'],
                category_dim=sizes['category_dim'])
    return _parts(sizes, neck)


def _bert_parts(sizes: Mapping) -> dict:
    neck = dict(type='GraphPropagation', fps_levels=sizes['fps_levels'], hidden=sizes['propagation_hidden'],
                graph_dim=sizes['graph_dim'])
    return _parts(sizes, neck)


def _parts(sizes: Mapping, neck: dict) -> dict:
    if len(sizes['out_indices']) != sizes['num_outputs']:
        raise ValueError(f'out_indices={tuple(sizes["out_indices"])}: the weights take the features of '
                         f'{sizes["num_outputs"]} blocks')
    neck.update({key: sizes[key] for key in ('out_indices', 'num_categories')})
    head = dict(type='PartSegHead', **{key: sizes[key] for key in ('num_parts', 'hidden', 'parts')})
    return dict(type='TaskModel', backbone=_backbone(sizes), neck=neck, head=head)


def _dvae(sizes: Mapping) -> dict:
    names = ('num_groups', 'group_size', 'encoder_dim', 'num_tokens', 'token_dim', 'decoder_dim', 'encoder_widths',
             'graph_widths', 'decoder_widths')
    return dict(type='DiscreteVAE', skip_origin=True, **{key: sizes[key] for key in names})


def _mae_pretrain(sizes: Mapping) -> dict:
    own = {key: sizes[key] for key in ('decoder_depth', 'decoder_mlp_ratio', 'mask_ratio', 'mask_type', 'loss')}
    return dict(type='MaskedAutoencoder', backbone=_backbone(sizes), pos_dim=sizes['decoder_pos_dim'], **own,
                decoder_num_heads=sizes['decoder_num_heads'] or sizes['num_heads'])


def _bert_pretrain(sizes: Mapping) -> dict:
    own = {key: sizes[key] for key in ('cls_dim', 'mask_ratio', 'mask_type', 'temperature', 'key_momentum',
                                       'queue_size')}
    return dict(type='MaskedTokenModel', backbone=_backbone(sizes), init_encoder=False, **own,
                dvae=_dvae({**sizes, 'encoder_dim': sizes['dvae_encoder_dim']}))


class _Task(NamedTuple):
    read: Callable[[_Reader], dict]
    defaults: dict
    config: Callable[[Mapping], dict]
    stored: Callable[[Mapping, str], dict] | None = None


_GROUPS = dict(num_heads=6, num_groups=64, group_size=32)
_CLASSIFIER = _Task(_read_classifier, _GROUPS, _classifier)
_SEGMENTATION = dict(num_heads=6, num_groups=128, group_size=32, out_indices=(3, 7, 11), parts=None)
_TASKS = {'point_mae': _CLASSIFIER, 'point_bert': _CLASSIFIER,
          'point_mae_partseg': _Task(_read_mae_parts, _SEGMENTATION, _mae_parts),
          'point_bert_partseg': _Task(_read_bert_parts, dict(_SEGMENTATION, fps_levels=(512, 256)), _bert_parts),
          'point_mae_pretrain': _Task(_read_mae_pretrain, dict(  # the decoder's heads are those of the encoder
              num_heads=6, decoder_num_heads=None, num_groups=64, mask_ratio=0.6, mask_type='rand', loss='cdl2'),
              _mae_pretrain),
          'point_bert_pretrain': _Task(_read_bert_pretrain, dict(
              num_heads=6, num_groups=64, mask_ratio=(0.25, 0.45), mask_type='block', temperature=0.07,
              key_momentum=0.999), _bert_pretrain),
          'dvae': _Task(_read_dvae, dict(num_groups=64, temperature=1.),
                        lambda sizes: dict(_dvae(sizes), temperature=sizes['temperature'])),
          '3detr': _Task(read_detr, DETR_DEFAULTS, detr_config, stored_detr)}
