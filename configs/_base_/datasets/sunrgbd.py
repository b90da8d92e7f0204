# SUN RGB-D v1 with turned boxes, as VoteNet prepares it: 10 classes, 20,000 points; the official augmentation.
# There is no other split than val: it is watched, and the last epoch is what is reported.
train_pipeline = [
    dict(type='SceneFlip', axes='x'),
    dict(type='SceneRotate', degrees=30),
    dict(type='SceneScale', scale=(0.85, 1.15)),
    dict(type='RandomCuboid', min_points=30_000, aspect=0.75, crop=(0.75, 1.0)),
    dict(type='Resample', num_points=20_000, method='random', pad='repeat'),
    dict(type='PackBoxes'),
]
test_pipeline = [
    dict(type='Resample', num_points=20_000, method='random', pad='repeat'),
    dict(type='PackBoxes'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='SUNRGBDDetection', split='train', pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(
    batch_size=8,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='SUNRGBDDetection', split='val', pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='BoxAP')
