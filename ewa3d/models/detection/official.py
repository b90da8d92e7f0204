"""Which 3DETR an official checkpoint holds: see :mod:`ewa3d.models.official`."""
from collections.abc import Mapping

from ewa3d.checks import some

__all__ = ['DETR_DEFAULTS', 'detr_config', 'read_detr', 'stored_detr']

# What weights do not tell: here the official defaults, which the arguments in a checkpoint replace.
DETR_DEFAULTS = dict(
    num_points=2048, radius=0.2, num_neighbors=64, num_heads=4, proj_drop=0.1, act_layer='relu',
    mask_radius=(0.4, 0.8, 1.2), mask_radius_compat=True, downsample_radius=0.4, downsample_neighbors=32,
    num_queries=256, decoder_num_heads=4, decoder_proj_drop=0.1, head_dropout=0.3, giou='official', costs=None,
    loss_weights=None)
_STORED = dict(preenc_npoints='num_points', enc_nhead='num_heads', enc_dropout='proj_drop',
               enc_activation='act_layer', nqueries='num_queries', dec_nhead='decoder_num_heads',
               dec_dropout='decoder_proj_drop', mlp_dropout='head_dropout')
_COSTS = dict(matcher_giou_cost='giou', matcher_cls_cost='sem_cls', matcher_center_cost='center',
              matcher_objectness_cost='objectness')
_WEIGHTS = dict(loss_giou_weight='giou', loss_sem_cls_weight='sem_cls', loss_no_object_weight='no_object',
                loss_angle_cls_weight='angle_cls', loss_angle_reg_weight='angle_reg', loss_center_weight='center',
                loss_size_weight='size')


def stored_detr(stored: Mapping, name: str) -> dict:
    """Sizes and settings of the arguments in a checkpoint.

    Raises:
        ValueError: arguments of a model that ewa3d has not.
    """
    for key, expected in (('pos_embed', 'fourier'), ('enc_pos_embed', None)):
        if stored.get(key, expected) != expected:
            raise ValueError(f'{name}: its model has {key}={stored[key]!r}; only {expected!r} is supported')

    def taken(names: Mapping[str, str]) -> dict:
        return {ours: stored[key] for key, ours in names.items() if stored.get(key) is not None}
    return {**taken(_STORED), 'costs': taken(_COSTS), 'loss_weights': taken(_WEIGHTS)}


def read_detr(read) -> dict:
    """Sizes of the weights: widths, depths, the number of classes and of heading bins, features of points, and whether
    the encoder thins out, which makes it 3DETR-m.

    Raises:
        ValueError: naming the file: layers that are not those of the network.
    """
    width, dim = read.size('backbone.blocks.0.norm1.weight'), read.size('neck.norm.weight')
    layers = read.numbers('neck.project.')
    if layers != [i for i in range(len(layers) // 2 * 3) if i % 3 < 2]:
        raise ValueError(f'{read.name}: layers 0, 1, 3, 4, … were expected at {read.there("neck.project.")!r}, found '
                         f'{some(layers)}')
    return dict(
        embed_dim=width, depth=read.depth('backbone.blocks.'),
        mlp_ratio=read.mlp_ratio('backbone.blocks.0.mlp.fc1.weight', width),
        in_channels=read.size('backbone.tokenizer.mlp_convs.0.weight', 1), widths=_widths(read, 'backbone.tokenizer.'),
        downsample_widths=_widths(read, 'backbone.downsample.'), project_depth=len(layers) // 2,
        decoder_dim=dim, decoder_depth=read.depth('neck.blocks.'),
        decoder_mlp_ratio=read.mlp_ratio('neck.blocks.0.mlp.fc1.weight', dim),
        num_classes=read.size('head.sem_cls_head.8.weight') - 1,
        num_angle_bins=read.size('head.angle_cls_head.8.weight'))


def _widths(read, at: str) -> tuple[int, ...]:
    return tuple(read.size(f'{at}mlp_convs.{i}.weight') for i in read.numbers(f'{at}mlp_convs.'))


def detr_config(sizes: Mapping) -> dict:
    """The config of the model of these sizes.

    Raises:
        ValueError: another number of radii than blocks.
    """
    masked = bool(sizes['downsample_widths'])
    if masked and len(sizes['mask_radius']) != sizes['depth']:
        raise ValueError(f'mask_radius={sizes["mask_radius"]!r} must be one radius for each of the {sizes["depth"]} '
                         'blocks of the encoder')
    thinner = dict(type='SetAbstraction', num_points=sizes['num_points'] // 2, radius=sizes['downsample_radius'],
                   num_neighbors=sizes['downsample_neighbors'], widths=sizes['downsample_widths'], skip_origin=True)
    backbone = dict(
        type='SetEncoder', **{key: sizes[key] for key in ('embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'act_layer')},
        tokenizer=dict(type='SetAbstraction', skip_origin=True, **{key: sizes[key] for key in (
            'num_points', 'radius', 'num_neighbors', 'widths', 'in_channels')}),
        proj_drop=sizes['proj_drop'], attn_drop=sizes['proj_drop'], mask_radius_compat=sizes['mask_radius_compat'],
        mask_radius=sizes['mask_radius'] if masked else None, downsample=thinner if masked else None)
    neck = dict(
        type='QueryDecoder', num_queries=sizes['num_queries'], decoder_dim=sizes['decoder_dim'],
        depth=sizes['decoder_depth'], num_heads=sizes['decoder_num_heads'], mlp_ratio=sizes['decoder_mlp_ratio'],
        proj_drop=sizes['decoder_proj_drop'], attn_drop=sizes['decoder_proj_drop'],
        project_depth=sizes['project_depth'])
    head = dict(type='DETRHead', dropout=sizes['head_dropout'], **{key: sizes[key] for key in (
        'num_classes', 'num_angle_bins', 'costs', 'loss_weights', 'giou')})
    return dict(type='TaskModel', backbone=backbone, neck=neck, head=head)
