# The CPU-sized Point-MAE classifier trained from scratch on all of ModelNet10.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_cls.py', '../_base_/datasets/modelnet10-1k.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
