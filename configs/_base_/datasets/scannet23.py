# 23 scans of ScanNet v2 in VoteNet's layout: 17 for training, 6 of other rooms for validation; 8,192 points. There is
# no other split: val is watched, and the last epoch is what is reported.
train_pipeline = [
    dict(type='Resample', num_points=8192, method='random'),
    dict(type='SceneFlip', axes='xy'),
    dict(type='SceneRotate', degrees=5, refit=True),
    dict(type='PackBoxes'),
]
test_pipeline = [
    dict(type='Resample', num_points=8192, method='random'),
    dict(type='PackBoxes'),
]
train_dataloader = dict(
    batch_size=6,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ScanNetDetection', split='train', pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(
    batch_size=6,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ScanNetDetection', split='val', pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='BoxAP')
