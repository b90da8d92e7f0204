# Fine-tuning a pretrained ViT: AdamW 5e-4, layer-wise decay 0.65 of the learning rate, weight decay 0.05, 5 of 50
# epochs of warm-up, cosine to 1e-6.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=1),
    constructor='ParamGroups',
    paramwise_cfg=dict(layer_decay=0.65, expert_lr_mult=1.0))
param_scheduler = dict(type='WarmupCosineLR', warmup=0.1, eta_min=1e-6)
train_cfg = dict(by_epoch=True, max_epochs=50, val_interval=5)
val_cfg = dict()
test_cfg = dict()
