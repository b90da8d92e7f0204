# ImageNet-1k at 224 pixels, data/imagenet/{train,val}/n01440764/…, augmented as DeiT but for two things: torchvision's
# RandAugment (magnitude 9) stands for timm's (rand-m9-mstd0.5-inc1), whose magnitudes are jittered, and every image
# comes once an epoch where DeiT has each third image three times. Color jitter is off in both.
mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
train_pipeline = [
    dict(
        type='ImageTransforms',
        transforms=[
            dict(name='RandomResizedCrop', size=224, interpolation='bicubic'),
            dict(name='RandomHorizontalFlip'),
            dict(name='RandAugment', num_ops=2, magnitude=9, interpolation='bicubic'),
            dict(name='ToImage'),
            dict(name='ToDtype', dtype='float32', scale=True),
            dict(name='Normalize', mean=mean, std=std),
            dict(name='RandomErasing', p=0.25, value='random'),
        ]),
    dict(type='PackImage'),
]
test_pipeline = [
    dict(
        type='ImageTransforms',
        transforms=[dict(name='Resize', size=256, interpolation='bicubic'), dict(name='CenterCrop', size=224)]),
    dict(type='PackImage', mean=mean, std=std),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=10,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ImageNet', data_root='data/imagenet', split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=96,
    num_workers=10,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ImageNet', data_root='data/imagenet', split='val', pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
