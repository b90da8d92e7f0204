# Point-BERT, pretrained on ShapeNet-55, fine-tuned on few-shot ModelNet40:
#     python tools/fewshot.py configs/point_bert/point-bert_s_ft_fewshot-modelnet40.py --way 5 10 --shot 10 20
# Official weights instead of your own: --cfg-options model.pretrained=FILE.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_cls.py', '../_base_/datasets/fewshot-modelnet40.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(pretrained='work_dirs/point-bert_s_pt_shapenet55/epoch_300.pth')
train_cfg = dict(max_epochs=150, val_interval=1)
param_scheduler = dict(warmup=10 / 150)
default_hooks = dict(checkpoint=dict(interval=50))  # an epoch is a few steps
