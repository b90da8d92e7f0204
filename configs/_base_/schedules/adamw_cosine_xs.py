# For the CPU-sized models: bf16 autocast, a larger learning rate and a fifth of the epochs.
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=10),
    constructor='ParamGroups',
    paramwise_cfg=dict(expert_lr_mult=1.0))
param_scheduler = dict(type='WarmupCosineLR', warmup=0.05, eta_min=1e-6)
train_cfg = dict(by_epoch=True, max_epochs=60, val_interval=10)
val_cfg = dict()
test_cfg = dict()
