# ModelNet10, all 4,899 shapes (3,991 train / 908 test) of 1,024 points each, z up.
# Training sees a random 768 of the 1,024 points; the test sees all of them.
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
    batch_size=32,
    num_workers=0,  # 8 % of a step of the xs model; a worker pays off for larger models or faster devices
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ModelNet', variant=10, split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ModelNet', variant=10, split='test', pipeline=test_pipeline))
# There is no validation split: the test split is looked at while training, and the last epoch is what is reported.
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
