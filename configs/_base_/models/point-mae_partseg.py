# Point-MAE's part segmentation at its official size: features of blocks 3, 7 and 11, side by side, carried to points.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='PointPatchEmbed', num_groups=128, group_size=32, embed_dim=384, skip_origin=True),
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.1,
        cls_token=False),
    neck=dict(type='PointFeaturePropagation', out_indices=(3, 7, 11)),
    head=dict(type='PartSegHead', hidden=(512, 256), dropout=0.5))
