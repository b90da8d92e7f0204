# A Point-MAE classifier that trains on one CPU core: 6 blocks of 96, 32 groups of 16 points, a narrow mini-PointNet.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='PointPatchEmbed', num_groups=32, group_size=16, embed_dim=96, widths=(32, 64, 128)),
        embed_dim=96,
        depth=6,
        num_heads=4,
        drop_path_rate=0.1),
    neck=dict(type='TokenPool', mode='cls+max'),
    head=dict(type='ClsHead', form='mlp', dropout=0.5, label_smoothing=0.1))
