# The CPU-sized Point-MAE pretrained on the training clouds of ModelNet10, without labels, in bf16.
# The metrics: Chamfer distances (× 1000) of what is visible and reconstructed to the whole cloud, and a linear SVM.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_pretrain.py', '../_base_/datasets/modelnet10-pt.py',
    '../_base_/schedules/adamw_cosine_pt.py', '../_base_/protocols/svm_modelnet10.py'
]
optim_wrapper = dict(type='AutocastOptimWrapper', optimizer=dict(lr=2e-3))
param_scheduler = dict(warmup=0.05)
train_cfg = dict(max_epochs=80)
val_evaluator = test_evaluator = dict(type='ReconstructionError')
default_hooks = dict(svm=_base_.svm_hook, pictures=dict(type='ReconstructionHook', interval=10))
