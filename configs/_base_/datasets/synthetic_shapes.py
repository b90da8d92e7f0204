# The embedded data set: parametric shapes made on the fly from a seed, no download.
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=512, method='random'),
    dict(type='RandomScale', scale=(0.8, 1.25)),
    dict(type='RandomShift', shift=0.1),
    dict(type='Pack'),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=512, method='random'),
    dict(type='Pack'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='SyntheticShapes', split='train', num_samples=2000, num_points=1024, pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='SyntheticShapes', split='test', num_samples=500, num_points=1024, pipeline=test_pipeline))
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
