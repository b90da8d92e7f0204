# The CPU-sized detector on 17 scans of ScanNet, with boxes along the axes: can it learn them? What it finds in 6 scans
# of other rooms is reported as it is.
_base_ = [
    '../_base_/runtime.py',
    '../_base_/models/3detr_xs.py',
    '../_base_/datasets/scannet23.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
model = dict(
    backbone=dict(tokenizer=dict(num_points=1024, radius=0.25, num_neighbors=32)),
    neck=dict(num_queries=128),
    head=dict(num_angle_bins=1, costs=dict(center=0.0)))
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1))
default_hooks = dict(checkpoint=dict(interval=50))
train_cfg = dict(max_epochs=600, val_interval=100)
