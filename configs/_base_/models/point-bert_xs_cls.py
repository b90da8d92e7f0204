# A Point-BERT classifier that trains on one CPU core: the backbone of point-bert_xs_pretrain.py.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(
            type='PointPatchEmbed', num_groups=32, group_size=16, embed_dim=96, encoder_dim=96, widths=(32, 64, 128)),
        embed_dim=96,
        depth=6,
        num_heads=4,
        drop_path_rate=0.1),
    neck=dict(type='TokenPool', mode='cls+max'),
    head=dict(type='ClsHead', form='mlp_nobn', dropout=0.5, label_smoothing=0.1))
