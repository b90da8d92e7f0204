# The CPU-sized tokenizer trained on the training clouds of ModelNet10, without augmentation, in fp32.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_xs_dvae.py', '../_base_/datasets/modelnet10-pt.py',
    '../_base_/schedules/adamw_cosine_pt.py'
]
plain_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=768, method='random'),
    dict(type='Pack'),
]
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=plain_pipeline))
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=5e-4))
param_scheduler = dict(warmup=0.05)
train_cfg = dict(max_epochs=30)
val_evaluator = test_evaluator = [dict(type='ReconstructionError'), dict(type='CodeUsage', num_tokens=512)]
default_hooks = dict(dvae=_base_.dvae_hook, pictures=dict(type='ReconstructionHook', interval=10))
