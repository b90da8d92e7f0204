# The CPU-sized Point-MAE classifier from scratch on few-shot ModelNet10, to compare with pretrained weights:
#     python tools/fewshot.py configs/point_mae/point-mae_xs_scratch_fewshot-modelnet10.py [--pretrained FILE]
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_cls.py', '../_base_/datasets/fewshot-modelnet10.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
train_cfg = dict(max_epochs=150, val_interval=5)
default_hooks = dict(checkpoint=dict(interval=50))  # an epoch is a few steps
