# The official Point-MAE pretraining schedule: AdamW 1e-3, weight decay 0.05 (by name), no gradient clipping, 10 of 300
# epochs of warm-up, cosine to 1e-6. Warm-up is a fraction of the run, so train_cfg.max_epochs alone rescales it all.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05, fused=True),
    constructor='ParamGroups',
    paramwise_cfg=dict(expert_lr_mult=1.0))
param_scheduler = dict(type='WarmupCosineLR', warmup=10 / 300, eta_min=1e-6)
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=10)
val_cfg = dict()
test_cfg = dict()
