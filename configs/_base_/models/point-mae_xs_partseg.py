# Point-MAE's part segmentation on one CPU core: 6 blocks of 96, 64 groups of 16 points, narrow layers at the points.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='PointPatchEmbed', num_groups=64, group_size=16, embed_dim=96, widths=(32, 64, 128)),
        embed_dim=96,
        depth=6,
        num_heads=4,
        drop_path_rate=0.1,
        cls_token=False),
    neck=dict(type='PointFeaturePropagation', out_indices=(1, 3, 5), hidden=192, out_dim=96, category_dim=16),
    head=dict(type='PartSegHead', hidden=(96, 64), dropout=0.1))
