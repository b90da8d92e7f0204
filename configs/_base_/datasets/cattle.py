# 94 scans of cattle with four parts (65 / 9 / 20), of 2,059 to 12,451 points; one category, so models are not told it.
# The validation split chooses the epoch.
metainfo = dict(up_axis='y')  # the files do not say
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=2048, method='random'),
    dict(type='RandomRotate', axis='up', degrees=10),
    dict(type='RandomScale', scale=(0.8, 1.25)),
    dict(type='RandomShift', shift=0.1),
    dict(type='RandomJitter', sigma=0.005, clip=0.02),
    dict(type='Pack'),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='KeepAll'),
    dict(type='Resample', num_points=2048, method='random'),
    dict(type='Pack'),
]
vote_pipeline = [  # of test.py --vote
    dict(type='Normalize'),
    dict(type='KeepAll'),
    dict(type='Resample', num_points=2048, method='random'),
    dict(type='RandomScale', scale=(0.8, 1.25)),
    dict(type='RandomShift', shift=0.1),
    dict(type='Pack'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ShapeNetPart',
        data_root='data/cattle_partanno_v0',
        split='train',
        metainfo=metainfo,
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='ShapeNetPart',
        data_root='data/cattle_partanno_v0',
        split='val',
        metainfo=metainfo,
        pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='ShapeNetPart',
        data_root='data/cattle_partanno_v0',
        split='test',
        metainfo=metainfo,
        pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='PartIoU')
