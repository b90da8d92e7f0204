# The official 3DETR schedule: AdamW 5e-4, weight decay 0.1, gradient norm 0.1, batches of 8, 9 of 1080 epochs of linear
# warm-up from 1e-6, cosine to 1e-6. Warm-up is a fraction of the run, so train_cfg.max_epochs alone rescales it all.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.1, fused=True),
    clip_grad=dict(max_norm=0.1),
    constructor='ParamGroups',
    paramwise_cfg=dict(expert_lr_mult=1.0))
param_scheduler = dict(type='WarmupCosineLR', warmup=9 / 1080, warmup_factor=2e-3, eta_min=1e-6)
train_cfg = dict(by_epoch=True, max_epochs=1080, val_interval=90)
val_cfg = dict()
test_cfg = dict()
