# Point-MAE's pretraining on one CPU core: the encoder of point-mae_xs_cls.py and a decoder of 2 blocks.
model = dict(
    type='MaskedAutoencoder',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='PointPatchEmbed', num_groups=32, group_size=16, embed_dim=96, widths=(32, 64, 128)),
        embed_dim=96,
        depth=6,
        num_heads=4,
        drop_path_rate=0.1,
        cls_token=False),
    decoder_depth=2,
    decoder_num_heads=4,
    mask_ratio=0.6,
    mask_type='rand',
    drop_path_rate=0.1,
    loss='cdl2')
