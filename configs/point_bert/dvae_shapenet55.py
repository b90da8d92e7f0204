# Point-BERT's tokenizer trained on ShapeNet-55 by the official recipe: batch 64, 300 epochs, clouds as they are.
# The metrics: Chamfer distances (× 1000) of the reconstruction to the cloud, and how much of the vocabulary is used.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_dvae.py', '../_base_/datasets/shapenet55.py',
    '../_base_/schedules/adamw_cosine_pt.py'
]
train_dataloader = dict(batch_size=64, dataset=dict(pipeline=_base_.test_pipeline))  # no augmentation
optim_wrapper = dict(optimizer=dict(lr=5e-4, weight_decay=5e-4))
val_evaluator = test_evaluator = [dict(type='ReconstructionError'), dict(type='CodeUsage', num_tokens=8192)]
default_hooks = dict(dvae=_base_.dvae_hook, pictures=dict(type='ReconstructionHook', interval=20))
