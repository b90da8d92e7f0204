# Point-MAE's pretraining at its official size: the encoder of point-mae_cls.py without a class token, 60 % of the
# patches masked at random, a decoder of 4 blocks, squared Chamfer distance; 29.0 M parameters.
model = dict(
    type='MaskedAutoencoder',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='PointPatchEmbed', num_groups=64, group_size=32, embed_dim=384, skip_origin=True),
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.1,
        cls_token=False),
    decoder_depth=4,
    decoder_num_heads=6,
    mask_ratio=0.6,
    mask_type='rand',
    drop_path_rate=0.1,
    loss='cdl2')
