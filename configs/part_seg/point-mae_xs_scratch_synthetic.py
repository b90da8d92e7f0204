# The CPU-sized Point-MAE part segmentation on the embedded shapes: at most three minutes on two cores.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_partseg.py', '../_base_/datasets/synthetic_parts.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
model = dict(
    backbone=dict(tokenizer=dict(num_groups=128), drop_path_rate=0.0), head=dict(dropout=0.0))  # a short run
optim_wrapper = dict(optimizer=dict(lr=4e-3))
train_cfg = dict(max_epochs=7, val_interval=7)
