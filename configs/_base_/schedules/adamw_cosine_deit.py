# The official DeiT schedule: AdamW, 5e-4 for 512 images a step (here 1e-3 for 1,024: 16 processes of 64 images, or
# accumulative_counts), weight decay 0.05 but for norms, biases, tokens and positions, no clipping, 5 of 300 epochs of
# warm-up from 1e-6, cosine to 1e-5.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
    constructor='ParamGroups',
    paramwise_cfg=dict(expert_lr_mult=1.0))
param_scheduler = dict(type='WarmupCosineLR', warmup=5 / 300, warmup_factor=1e-3, eta_min=1e-5)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=10)
val_cfg = dict()
test_cfg = dict()
