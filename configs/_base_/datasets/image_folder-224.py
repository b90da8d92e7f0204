# Your own images at 224 pixels: data_root/{train,test}/<class>/*. The number of classes flows to the head.
# Elsewhere: --cfg-options {train,val,test}_dataloader.dataset.data_root=FOLDER
mean, std = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
train_pipeline = [
    dict(
        type='ImageTransforms',
        transforms=[
            dict(name='RandomResizedCrop', size=224, scale=[0.3, 1.0], interpolation='bicubic'),
            dict(name='RandomHorizontalFlip'),
            dict(name='TrivialAugmentWide'),
        ]),
    dict(type='PackImage', mean=mean, std=std),
]
test_pipeline = [
    dict(
        type='ImageTransforms',
        transforms=[dict(name='Resize', size=248, interpolation='bicubic'), dict(name='CenterCrop', size=224)]),
    dict(type='PackImage', mean=mean, std=std),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ImageFolder', data_root='data/my_images', split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=128,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ImageFolder', data_root='data/my_images', split='test', pipeline=test_pipeline))
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
