# S4D's minimal recipe: AdamW 1e-2, weight decay 0.01, no warm-up, cosine to 0 in 100 epochs; the state spaces learn at
# 1e-3 without decay.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.01, fused=True),
    constructor='ParamGroups',
    paramwise_cfg=dict(ssm_lr=1e-3))
param_scheduler = dict(type='WarmupCosineLR', warmup=0, eta_min=0)
train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=5)
val_cfg = dict()
test_cfg = dict()
