# Point-MAE pretrained on the training list of ShapeNet-55 by the official recipe: batch 128, 300 epochs.
# The metrics: Chamfer distances (× 1000) of what is visible and reconstructed to the whole cloud, and a linear SVM.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_pretrain.py', '../_base_/datasets/shapenet55.py',
    '../_base_/schedules/adamw_cosine_pt.py', '../_base_/protocols/svm_modelnet40.py'
]
val_evaluator = test_evaluator = dict(type='ReconstructionError')
default_hooks = dict(svm=_base_.svm_hook, pictures=dict(type='ReconstructionHook', interval=20))
