# A Point-MAE classifier that trains on one CPU core: 6 blocks of 96, 32 groups of 16 points, a narrow mini-PointNet.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_cls.py', '../_base_/datasets/modelnet10-1k.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(
    backbone=dict(
        tokenizer=dict(num_groups=32, group_size=16, embed_dim=96, widths=(32, 64, 128)),
        embed_dim=96,
        depth=6,
        num_heads=4),
    head=dict(label_smoothing=0.1))
optim_wrapper = dict(type='AutocastOptimWrapper', optimizer=dict(lr=2e-3))
param_scheduler = dict(warmup=0.05)
train_cfg = dict(max_epochs=60)
