# A small ViT on the frames of clips that trains on one CPU core: 4 blocks of 96 on 32 × 32 pixels in patches of 8.
# Where a thing was a frame ago is found by position, hence positions before every block and a mean over all patches.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TokenEncoder',
        tokenizer=dict(type='VideoPatchEmbed', num_frames=8, img_size=32, patch_size=8),
        embed_dim=96,
        depth=4,
        num_heads=4,
        qkv_bias=True,
        norm_eps=1e-6,
        pos='every',
        drop_path_rate=0.0),
    neck=dict(type='ClipPool', mode='mean'),
    head=dict(type='I3DHead', dropout=0.0))
