# Point-BERT's part segmentation at its official size: features of blocks 3, 7 and 11 are carried to 512, 256 and 128
# points, refined by edge convolutions on the way up, and carried to all points.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(
            type='PointPatchEmbed',
            num_groups=128,
            group_size=32,
            embed_dim=384,
            encoder_dim=256,
            skip_origin=True),
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.1),
    neck=dict(type='GraphPropagation', out_indices=(3, 7, 11), fps_levels=(512, 256)),
    head=dict(type='PartSegHead', hidden=(128,), dropout=0.5))
