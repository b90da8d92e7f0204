# Something-Something v2 by mmaction2's lists: a frame of each of 16 equal parts; three squares for the test. Mirroring
# swaps the labels that tell left from right.
mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
train_pipeline = [
    dict(type='LoadClip', clip_len=16, short_side=256),
    dict(type='ImageTransforms', transforms=[dict(name='RandomResizedCrop', size=224)]),
    dict(type='ClipFlip', swap={86: 87, 93: 94, 166: 167}),
    dict(
        type='ImageTransforms',
        transforms=[
            dict(name='RandAugment', num_ops=4, magnitude=7),
            dict(name='ToDtype', dtype='float32', scale=True),
            dict(name='Normalize', mean=mean, std=std),
            dict(name='RandomErasing', p=0.25),
        ]),
    dict(type='PackClip'),
]
val_pipeline = [
    dict(type='LoadClip', clip_len=16, short_side=256, test=True),
    dict(type='ImageTransforms', transforms=[dict(name='CenterCrop', size=224)]),
    dict(type='PackClip', mean=mean, std=std),
]
test_pipeline = [
    dict(type='LoadClip', clip_len=16, short_side=224, test=True),
    dict(type='ThreeCrop', size=224),
    dict(type='PackClip', mean=mean, std=std),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='VideoDataset',
        data_root='data/sthv2/videos',
        ann_file='data/sthv2/sthv2_train_list_videos.txt',
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=4,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='VideoDataset',
        split='val',
        data_root='data/sthv2/videos',
        ann_file='data/sthv2/sthv2_val_list_videos.txt',
        pipeline=val_pipeline))
test_dataloader = dict(
    batch_size=2,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='VideoDataset',
        split='val',
        data_root='data/sthv2/videos',
        ann_file='data/sthv2/sthv2_val_list_videos.txt',
        pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='Accuracy')
