# The control: every frame for itself, features averaged.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/video-vit_xs_cls.py', '../_base_/datasets/moving-shapes.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
optim_wrapper = dict(
    optimizer=dict(lr=1e-3, betas=(0.9, 0.98)),
    clip_grad=dict(max_norm=1),
    paramwise_cfg=dict(no_decay=['bias', 'norm', 'token', 'cls_pos', 'pos_embed']))
train_cfg = dict(max_epochs=12, val_interval=3)
