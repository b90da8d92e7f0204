# The CPU-sized Point-BERT pretrained on the training clouds of ModelNet10, without labels, in bf16.
# First the tokenizer: dvae_xs_modelnet10.py.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_xs_pretrain.py', '../_base_/datasets/modelnet10-pt.py',
    '../_base_/schedules/adamw_cosine_pt.py', '../_base_/protocols/svm_modelnet10.py'
]
model = dict(dvae=dict(pretrained='work_dirs/dvae_xs_modelnet10/epoch_30.pth'))
optim_wrapper = dict(type='AutocastOptimWrapper', optimizer=dict(lr=1e-3))
param_scheduler = dict(warmup=0.05)
train_cfg = dict(max_epochs=30)
val_evaluator = test_evaluator = dict(type='TokenAccuracy')
default_hooks = dict(svm=_base_.svm_hook)
