# Point-BERT, pretrained on ShapeNet-55, fine-tuned on ModelNet40 at 4,096 points and 256 groups.
# Official weights instead of your own: --cfg-options model.pretrained=FILE.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_cls.py', '../_base_/datasets/modelnet40-4k.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(
    backbone=dict(tokenizer=dict(num_groups=256)),
    pretrained='work_dirs/point-bert_s_pt_shapenet55/epoch_300.pth')
