# ScanNet v2 with boxes along the axes, as VoteNet prepares it: 18 classes, 40,000 points; the official augmentation.
# There is no other split than val: it is watched, and the last epoch is what is reported.
train_pipeline = [
    dict(type='RandomCuboid', min_points=30_000, aspect=0.8, crop=(0.5, 1.0)),
    dict(type='Resample', num_points=40_000, method='random', pad='repeat'),
    dict(type='SceneFlip', axes='xy'),
    dict(type='SceneRotate', degrees=5, refit=True),
    dict(type='PackBoxes'),
]
test_pipeline = [
    dict(type='Resample', num_points=40_000, method='random', pad='repeat'),
    dict(type='PackBoxes'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ScanNetDetection', split='train', pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ScanNetDetection', split='val', pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='BoxAP')
