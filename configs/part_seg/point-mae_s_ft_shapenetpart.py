# Point-MAE, pretrained on ShapeNet-55, fine-tuned on ShapeNetPart: the official schedule, 300 epochs at 2e-4.
# Official weights instead of your own: --cfg-options model.pretrained=FILE.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_partseg.py', '../_base_/datasets/shapenetpart.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(pretrained='work_dirs/point-mae_s_pt_shapenet55/epoch_300.pth')
optim_wrapper = dict(optimizer=dict(lr=2e-4))
