# Point-MAE's classifier trained from scratch by the official recipe.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_cls.py', '../_base_/datasets/modelnet40-1k.py',
    '../_base_/schedules/adamw_cosine.py'
]
