# One trunk for images and clouds: the blocks of vit_xs_cls.py (6 × 96), a tokenizer and a class token for each.
# Positions are added once, before the first block.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(
            points=dict(type='PointPatchEmbed', num_groups=32, group_size=16, widths=(32, 64, 128)),
            img=dict(type='ImagePatchEmbed', img_size=32, patch_size=4)),
        embed_dim=96,
        depth=6,
        num_heads=4,
        qkv_bias=True,
        norm_eps=1e-6,
        pos='first',
        drop_path_rate=0.1),
    tasks=dict(
        cifar10=dict(
            modality='img',
            neck=dict(type='TokenPool', mode='cls'),
            head=dict(type='ClsHead', form='linear', label_smoothing=0.1)),
        modelnet10=dict(
            modality='points',
            neck=dict(type='TokenPool', mode='cls+max'),
            head=dict(type='ClsHead', form='mlp', dropout=0.5, label_smoothing=0.1))))
