# Point-BERT, pretrained on ShapeNet-55, fine-tuned on ShapeNetPart: 300 epochs at 5e-4, batch norms that average longer
# and longer. Official weights instead of your own: --cfg-options model.pretrained=FILE.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_partseg.py', '../_base_/datasets/shapenetpart.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(pretrained='work_dirs/point-bert_s_pt_shapenet55/epoch_300.pth')
default_hooks = dict(bn_momentum=dict(type='BatchNormMomentumHook'))
