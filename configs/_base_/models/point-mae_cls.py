# Point-MAE's classifier at its official size: 12 blocks of 384, 64 groups of 32 points; 22.1 M parameters.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='PointPatchEmbed', num_groups=64, group_size=32, embed_dim=384, skip_origin=True),
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.1),
    neck=dict(type='TokenPool', mode='cls+max'),
    head=dict(type='ClsHead', form='mlp', dropout=0.5))
