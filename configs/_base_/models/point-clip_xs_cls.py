# A small point transformer on the clouds of clips that trains on one CPU core: 4 blocks of 96, 16 groups of 16 points.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='PointClipEmbed', num_frames=8, num_groups=16, group_size=16, widths=(32, 64, 128)),
        embed_dim=96,
        depth=4,
        num_heads=4,
        drop_path_rate=0.0),
    neck=dict(type='ClipPool', mode='cls'),
    head=dict(type='I3DHead', dropout=0.0))
