# The official ZeroI2V schedule: AdamW 3e-4 for 64 clips a step (8 processes of 8), weight decay 0.05 but for norms,
# biases and embeddings, 2.5 of 40 epochs of warm-up from a tenth, cosine to 0, mixed precision.
optim_wrapper = dict(
    type='AutocastOptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-4, weight_decay=0.05, fused=True),
    constructor='ParamGroups',
    paramwise_cfg=dict(expert_lr_mult=1.0))
param_scheduler = dict(type='WarmupCosineLR', warmup=2.5 / 40, warmup_factor=0.1, eta_min=0)
train_cfg = dict(by_epoch=True, max_epochs=40, val_interval=5)
val_cfg = dict()
test_cfg = dict()
