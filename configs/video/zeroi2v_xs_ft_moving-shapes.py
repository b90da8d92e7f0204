# ZeroI2V as it is meant: the small ViT that was trained on the images of CIFAR-10 (configs/vit) is frozen; adapters,
# STDHA, the temporal embedding, the final norm and the head learn to see motion. The tool fuses the adapters away.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/video-vit_xs_cls.py', '../_base_/datasets/moving-shapes.py',
    '../_base_/schedules/adamw_cosine_xs.py', '../_base_/reparam/stdha_xs.py', '../_base_/reparam/adapter.py'
]
model = dict(
    backbone=dict(tokenizer=dict(patch_size=4), depth=6, pos='first'),
    expand=_base_.stdha + _base_.adapter,
    trainable=_base_.adapter_trainable,
    pretrained=dict(source='work_dirs/vit_xs_scratch_cifar10/epoch_24.pth', strict=False, skip_head=True))
optim_wrapper = dict(
    optimizer=dict(lr=2e-3, betas=(0.9, 0.98)),
    clip_grad=dict(max_norm=1),
    paramwise_cfg=dict(no_decay=['bias', 'norm', 'token', 'cls_pos', 'pos_embed']))
train_cfg = dict(max_epochs=12, val_interval=3)
