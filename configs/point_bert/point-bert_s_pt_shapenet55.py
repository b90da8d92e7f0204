# Point-BERT pretrained on both lists of ShapeNet-55 by the official recipe: batch 128, 300 epochs, 3 of warm-up.
# First the tokenizer: dvae_shapenet55.py, or an official file: --cfg-options model.dvae.pretrained=FILE.
# The metrics: how many of the masked patches' codes are predicted, and a linear SVM.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_pretrain.py', '../_base_/datasets/shapenet55.py',
    '../_base_/schedules/adamw_cosine_pt.py', '../_base_/protocols/svm_modelnet40.py'
]
model = dict(dvae=dict(pretrained='work_dirs/dvae_shapenet55/epoch_300.pth'))
train_dataloader = dict(dataset=dict(whole=True))
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = dict(warmup=3 / 300)
val_evaluator = test_evaluator = dict(type='TokenAccuracy')
default_hooks = dict(svm=_base_.svm_hook)
