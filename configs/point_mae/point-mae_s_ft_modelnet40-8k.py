# Point-MAE, pretrained on ShapeNet-55, fine-tuned on ModelNet40 at 8,192 points and 512 groups.
# Official weights instead of your own: --cfg-options model.pretrained=FILE.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_cls.py', '../_base_/datasets/modelnet40-8k.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(
    backbone=dict(tokenizer=dict(num_groups=512)),
    pretrained='work_dirs/point-mae_s_pt_shapenet55/epoch_300.pth')
