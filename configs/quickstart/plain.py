# A small point transformer on the embedded shapes: minutes on one CPU core.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_cls.py', '../_base_/datasets/synthetic_shapes.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(
    backbone=dict(
        tokenizer=dict(num_groups=32, group_size=16, embed_dim=64, widths=(32, 64, 128)),
        embed_dim=64,
        depth=4,
        num_heads=4,
        drop_path_rate=0.0),
    head=dict(dropout=0.2, hidden=128))
optim_wrapper = dict(type='AutocastOptimWrapper', optimizer=dict(lr=2e-3))
param_scheduler = dict(warmup=0.05)
train_cfg = dict(max_epochs=14, val_interval=7)
