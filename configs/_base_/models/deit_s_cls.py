# DeiT-S: timm's deit_small_patch16_224, its own pooling and a linear head; 22.1 M parameters.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='ImagePreprocessor'),
    backbone=dict(type='TimmBackbone', name='deit_small_patch16_224', pool=True, drop_path_rate=0.1),
    head=dict(type='ClsHead', form='linear'))
