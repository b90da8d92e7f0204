# Point-BERT's pretraining on one CPU core: 6 blocks of 96 and the tokenizer of point-bert_xs_dvae.py. The queue holds
# about the same share of the data as the published one, and the key network follows faster, because a run is shorter.
model = dict(
    type='MaskedTokenModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(
            type='PointPatchEmbed', num_groups=32, group_size=16, embed_dim=96, encoder_dim=96, widths=(32, 64, 128)),
        embed_dim=96,
        depth=6,
        num_heads=4,
        drop_path_rate=0.1),
    dvae=dict(
        type='DiscreteVAE',
        encoder_dim=96,
        num_tokens=512,
        token_dim=96,
        decoder_dim=96,
        encoder_widths=(32, 64, 128),
        graph_widths=(64, 64, 96, 96, 128),
        decoder_widths=(256, 64),
        pretrained=None),
    cls_dim=128,
    mask_ratio=(0.25, 0.45),
    mask_type='block',
    contrast=True,
    moco=False,
    temperature=0.07,
    key_momentum=0.99,
    queue_size=1024)
