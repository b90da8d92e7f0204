# CLIP's ViT-B/16 on the frames of clips. Its image weights: model.backbone.checkpoint=FILE, the released CLIP or what
# timm has of it; without it this is training from scratch with a frozen random backbone.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='TimmVideoBackbone', name='vit_base_patch16_clip_quickgelu_224', num_frames=8, checkpoint=None),
    neck=dict(type='ClipPool', mode='cls'),
    head=dict(type='I3DHead', dropout=0.5))
