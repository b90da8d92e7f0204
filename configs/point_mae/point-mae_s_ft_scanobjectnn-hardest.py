# Point-MAE, pretrained on ShapeNet-55, fine-tuned on ScanObjectNN at 2,048 points and 128 groups.
# PB_T50_RS: shifted, turned and scaled boxes.
# Official weights instead of your own: --cfg-options model.pretrained=FILE.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_cls.py', '../_base_/datasets/scanobjectnn-2k.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(
    backbone=dict(tokenizer=dict(num_groups=128)),
    pretrained='work_dirs/point-mae_s_pt_shapenet55/epoch_300.pth')
train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(variant='hardest'))
