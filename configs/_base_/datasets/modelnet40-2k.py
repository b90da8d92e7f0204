# ModelNet40, modelnet40_normal_resampled, after the Point-BERT protocol at 2,048 points: training draws them from the
# first 2,400 by farthest point sampling, the test takes the first 2,048. See modelnet40-1k.py for the one difference.
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=2048, pool=2400, method='random'),
    dict(type='RandomScale', scale=(2 / 3, 3 / 2)),
    dict(type='RandomShift', shift=0.2),
    dict(type='Pack'),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=2048, method='fps'),
    dict(type='Pack'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ModelNet', variant=40, split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ModelNet', variant=40, split='test', pipeline=test_pipeline))
# There is no validation split: the test split is looked at while training, and the last epoch is what is reported.
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
