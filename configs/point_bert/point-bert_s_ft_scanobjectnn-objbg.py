# Point-BERT, pretrained on ShapeNet-55, fine-tuned on ScanObjectNN at 1,024 points and 64 groups.
# OBJ_BG: objects with what is around them.
# Official weights instead of your own: --cfg-options model.pretrained=FILE.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_cls.py', '../_base_/datasets/scanobjectnn-1k.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(pretrained='work_dirs/point-bert_s_pt_shapenet55/epoch_300.pth')
train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(variant='objbg'))
