# The control: the joint model's trunk and schedule on ModelNet10 alone, as many steps as it takes in the joint run.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_cls.py', '../_base_/datasets/modelnet10-1k.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
model = dict(backbone=dict(qkv_bias=True, norm_eps=1e-6, pos='first'))
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    clip_grad=dict(max_norm=1),
    paramwise_cfg=dict(no_decay=['bias', 'norm', 'token', 'cls_pos']))
train_cfg = dict(max_epochs=24, val_interval=12)
train_dataloader = dict(drop_last=False)
