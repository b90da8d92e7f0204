# The CPU-sized detector on the embedded rooms.
_base_ = [
    '../_base_/runtime.py',
    '../_base_/models/3detr_xs.py',
    '../_base_/datasets/synthetic_scenes.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1))
default_hooks = dict(checkpoint=dict(save_best='AP50_gt', interval=5))
train_cfg = dict(max_epochs=24, val_interval=4)
