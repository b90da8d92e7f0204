# The CPU-sized detector on your own scenes: see ../_base_/datasets/folder_scenes.py.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/3detr_xs.py', '../_base_/datasets/folder_scenes.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=1))
