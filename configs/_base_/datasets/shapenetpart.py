# ShapeNetPart as published: trained on the training and validation lists, 2,048 points drawn with repetition, in the
# test as well. The test is also on all points of each shape, which are given the scores of the drawn ones.
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=2048, method='random', replace=True),
    dict(type='RandomScale', scale=(0.8, 1.25), per_axis=False),
    dict(type='RandomShift', shift=0.1),
    dict(type='Pack', category=True),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='KeepAll'),
    dict(type='Resample', num_points=2048, method='random', replace=True),
    dict(type='Pack', category=True),
]
vote_pipeline = [  # of test.py --vote
    dict(type='Normalize'),
    dict(type='KeepAll'),
    dict(type='Resample', num_points=2048, method='random', replace=True),
    dict(type='RandomScale', scale=(0.8, 1.25), per_axis=False),
    dict(type='RandomShift', shift=0.1),
    dict(type='Pack', category=True),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ShapeNetPart', split='trainval', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=16,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ShapeNetPart', split='test', pipeline=test_pipeline))
# The validation list is trained on: the test split is looked at while training, and the last epoch is what is reported.
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='PartIoU')
