# Point-BERT's classifier at its official size: as Point-MAE's, but patch features of 256 that a linear layer widens,
# and a head without batch norm.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(
            type='PointPatchEmbed', num_groups=64, group_size=32, embed_dim=384, encoder_dim=256, skip_origin=True),
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.1),
    neck=dict(type='TokenPool', mode='cls+max'),
    head=dict(type='ClsHead', form='mlp_nobn', dropout=0.5))
