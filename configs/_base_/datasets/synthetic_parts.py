# The embedded data set with its 34 part labels: parametric shapes made on the fly from a seed, no download. Shapes that
# are tested are turned further than all that are trained on, and stand in boxes of a wider range.
shape_cfg = dict(noise=0.002, outliers=0.0, hidden=0.0, unevenness=0.3, tilt=15, turn=45)
new_shape_cfg = dict(
    noise=0.002, outliers=0.0, hidden=0.0, unevenness=0.3, tilt=15, turn=75, least_turn=45, stretch=0.4)
train_pipeline = [
    dict(type='Normalize'),
    dict(type='RandomRotate', degrees=30),
    dict(type='RandomScale', scale=(0.8, 1.25)),
    dict(type='RandomShift', shift=0.1),
    dict(type='Pack', category=True),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='KeepAll'),
    dict(type='Resample', num_points=1024, method='random'),
    dict(type='Pack', category=True),
]
vote_pipeline = [  # of test.py --vote
    dict(type='Normalize'),
    dict(type='KeepAll'),
    dict(type='Resample', num_points=1024, method='random'),
    dict(type='RandomScale', scale=(0.8, 1.25)),
    dict(type='RandomShift', shift=0.1),
    dict(type='Pack', category=True),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='SyntheticShapes',
        split='train',
        num_samples=2080,
        num_points=1024,
        shape_cfg=shape_cfg,
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='SyntheticShapes',
        split='val',
        num_samples=130,
        num_points=2048,
        shape_cfg=new_shape_cfg,
        pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='SyntheticShapes',
        split='test',
        num_samples=520,
        num_points=2048,
        shape_cfg=new_shape_cfg,
        pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='PartIoU')
