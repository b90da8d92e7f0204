# A check, no benchmark: the CPU-sized model learns sixteen real shapes by heart, one optimizer step an epoch.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_partseg.py', '../_base_/datasets/shapenetpart-16.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
default_hooks = dict(checkpoint=dict(interval=300))
model = dict(backbone=dict(tokenizer=dict(num_groups=128), drop_path_rate=0.0), head=dict(dropout=0.0))
train_cfg = dict(max_epochs=900, val_interval=300)
