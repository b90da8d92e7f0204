# A small ViT that trains on one CPU core: 6 blocks of 96 on 32 × 32 pixels in patches of 4.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='ImagePreprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='ImagePatchEmbed', img_size=32, patch_size=4),
        embed_dim=96,
        depth=6,
        num_heads=4,
        qkv_bias=True,
        norm_eps=1e-6,
        pos='first',
        drop_path_rate=0.1),
    neck=dict(type='TokenPool', mode='cls'),
    head=dict(type='ClsHead', form='linear', label_smoothing=0.1))
