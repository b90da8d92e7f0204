# UCF101, split 1, as folders of frames by mmaction2's lists: a frame of each of 8 equal parts; three squares for the
# test. HMDB51 and other sets in this form: data_root and ann_file.
mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
train_pipeline = [
    dict(type='LoadClip', clip_len=8, short_side=256),
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
    dict(type='LoadClip', clip_len=8, short_side=256, test=True),
    dict(type='ImageTransforms', transforms=[dict(name='CenterCrop', size=224)]),
    dict(type='PackClip', mean=mean, std=std),
]
test_pipeline = [
    dict(type='LoadClip', clip_len=8, short_side=224, test=True),
    dict(type='ThreeCrop', size=224),
    dict(type='PackClip', mean=mean, std=std),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='VideoDataset',
        data_root='data/ucf101/rawframes',
        ann_file='data/ucf101/ucf101_train_split_1_rawframes.txt',
        frames='img_*',
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='VideoDataset',
        split='val',
        data_root='data/ucf101/rawframes',
        ann_file='data/ucf101/ucf101_val_split_1_rawframes.txt',
        frames='img_*',
        pipeline=val_pipeline))
test_dataloader = dict(
    batch_size=4,
    num_workers=8,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='VideoDataset',
        split='val',
        data_root='data/ucf101/rawframes',
        ann_file='data/ucf101/ucf101_val_split_1_rawframes.txt',
        frames='img_*',
        pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='Accuracy')
