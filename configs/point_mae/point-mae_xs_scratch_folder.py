# The CPU-sized Point-MAE classifier on your own clouds: see ../_base_/datasets/folder.py and data/README.md.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_cls.py', '../_base_/datasets/folder.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
