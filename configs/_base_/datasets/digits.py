# The digits of scikit-learn: 1,197 images to train on, 600 by other hands to test, 8 × 8 pixels, one channel.
train_pipeline = [
    dict(
        type='ImageTransforms',
        transforms=[dict(name='RandomAffine', degrees=10, translate=[0.1, 0.1], scale=[0.9, 1.1],
                         interpolation='bilinear')]),
    dict(type='PackImage', mean=[0.3], std=[0.37]),
]
test_pipeline = [dict(type='PackImage', mean=[0.3], std=[0.37])]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='Digits', split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=200,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='Digits', split='test', pipeline=test_pipeline))
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
