# RMoE, stage 1 (optional): the residuals of the pretrained model, upstream and for a tenth of its epochs, cores frozen.
# Stage 0 is ../point_mae/point-mae_xs_pt_modelnet10.py.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_pretrain.py', '../_base_/datasets/modelnet10-pt.py',
    '../_base_/schedules/adamw_cosine_pt.py', '../_base_/reparam/rmoe.py'
]
model = dict(expand=_base_.rmoe_frozen, pretrained='work_dirs/point-mae_xs_pt_modelnet10/epoch_80.pth')
optim_wrapper = dict(type='AutocastOptimWrapper', optimizer=dict(lr=1e-3))
param_scheduler = dict(warmup=0.05)
train_cfg = dict(max_epochs=8, val_interval=8)
val_evaluator = test_evaluator = dict(type='ReconstructionError')
