# Kinetics-400 by mmaction2's lists: clips of 8 frames, every 16th; three clips of the middle square for the test.
mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
train_pipeline = [
    dict(type='LoadClip', clip_len=8, sampling='dense', interval=16, short_side=256),
    dict(
        type='ImageTransforms',
        transforms=[
            dict(name='RandAugment', num_ops=4, magnitude=7),
            dict(name='RandomResizedCrop', size=224),
        ]),
    dict(type='ClipFlip'),
    dict(type='PackClip', mean=mean, std=std),
]
val_pipeline = [
    dict(type='LoadClip', clip_len=8, sampling='dense', interval=16, short_side=256, test=True),
    dict(type='ImageTransforms', transforms=[dict(name='CenterCrop', size=224)]),
    dict(type='PackClip', mean=mean, std=std),
]
test_pipeline = [
    dict(type='LoadClip', clip_len=8, sampling='dense', interval=16, num_clips=3, short_side=224, test=True),
    dict(type='ImageTransforms', transforms=[dict(name='CenterCrop', size=224)]),
    dict(type='PackClip', mean=mean, std=std),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='VideoDataset',
        data_root='data/kinetics400/videos_train',
        ann_file='data/kinetics400/kinetics400_train_list_videos.txt',
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=8,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='VideoDataset',
        split='val',
        data_root='data/kinetics400/videos_val',
        ann_file='data/kinetics400/kinetics400_val_list_videos.txt',
        pipeline=val_pipeline))
test_dataloader = dict(
    batch_size=4,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='VideoDataset',
        split='val',
        data_root='data/kinetics400/videos_val',
        ann_file='data/kinetics400/kinetics400_val_list_videos.txt',
        pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='Accuracy')
