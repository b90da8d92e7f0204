# The CPU-sized Point-MAE part segmentation on your own clouds: see ../_base_/datasets/folder_parts.py.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_partseg.py', '../_base_/datasets/folder_parts.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
