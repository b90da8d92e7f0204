# CIFAR-10 and ModelNet10 on one trunk. In a distributed run, all ranks draw the same source at a time, and what belongs
# to the other one has no gradients in that step: find_unused_parameters.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/mixed_xs.py', '../_base_/datasets/cifar10_modelnet10.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
find_unused_parameters = True
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    clip_grad=dict(max_norm=1),
    paramwise_cfg=dict(no_decay=['bias', 'norm', 'token', 'cls_pos', 'img.pos_embed']))
train_cfg = dict(max_epochs=24, val_interval=12)
