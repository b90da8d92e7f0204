# The control: every cloud for itself, features averaged.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-clip_xs_cls.py', '../_base_/datasets/moving-clouds.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1))
train_cfg = dict(max_epochs=20, val_interval=5)
