# ModelNet10 for pretraining without labels: the clouds, points and augmentation of modelnet10-1k.py.
# What is measured meanwhile is the model's: a leaf config adds val_evaluator, and ../protocols/svm_modelnet10.py.
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=768, method='random'),
    dict(type='RandomScale', scale=(2 / 3, 3 / 2)),
    dict(type='RandomShift', shift=0.2),
    dict(type='Pack'),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=1024, method='fps'),
    dict(type='Pack'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ModelNet', variant=10, split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ModelNet', variant=10, split='test', pipeline=test_pipeline))
test_dataloader = val_dataloader
