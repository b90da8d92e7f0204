# Point-BERT's pretraining at its official size: 12 blocks of 384, the frozen tokenizer of point-bert_dvae.py, blocks of
# 25 to 45 % of the patches masked, mixed contrast with a queue of 16,384 keys; no MoCo term on the real clouds.
# A leaf config says where the tokenizer's weights are: model = dict(dvae=dict(pretrained=FILE)).
model = dict(
    type='MaskedTokenModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(
            type='PointPatchEmbed', num_groups=64, group_size=32, embed_dim=384, encoder_dim=256, skip_origin=True),
        embed_dim=384,
        depth=12,
        num_heads=6,
        drop_path_rate=0.1),
    dvae=dict(type='DiscreteVAE', encoder_dim=256, num_tokens=8192, token_dim=256, decoder_dim=256, pretrained=None),
    cls_dim=512,
    mask_ratio=(0.25, 0.45),
    mask_type='block',
    contrast=True,
    moco=False,
    temperature=0.07,
    key_momentum=0.999,
    queue_size=16384)
