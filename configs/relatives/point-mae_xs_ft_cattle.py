# The dense row of part segmentation from a pretrained model: the cattle scans.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_partseg.py', '../_base_/datasets/cattle.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
model = dict(neck=dict(num_categories=0), pretrained='work_dirs/point-mae_xs_pt_modelnet10/epoch_80.pth')
default_hooks = dict(checkpoint=dict(save_best='instance_mIoU', interval=20))
train_cfg = dict(max_epochs=400, val_interval=20)
