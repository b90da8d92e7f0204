# The small ViT on the digits of scikit-learn: 8 × 8 pixels in patches of 2.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/vit_xs_cls.py', '../_base_/datasets/digits.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
model = dict(backbone=dict(tokenizer=dict(img_size=8, patch_size=2, in_channels=1)))
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    clip_grad=dict(max_norm=1),
    paramwise_cfg=dict(no_decay=['bias', 'norm', 'token', 'cls_pos', 'pos_embed']))
train_cfg = dict(max_epochs=100)
