# CLIP's ViT-L/14.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/zeroi2v_b_cls.py', '../_base_/datasets/kinetics400-8x16.py',
    '../_base_/schedules/adamw_cosine_video.py', '../_base_/reparam/stdha_l.py', '../_base_/reparam/adapter.py'
]
model = dict(
    backbone=dict(name='vit_large_patch14_clip_quickgelu_224'),
    expand=_base_.stdha + _base_.adapter,
    trainable=_base_.adapter_trainable)
