# The embedded clips of moving clouds, 8 of 256 points: the order of the clouds decides the class. No download.
pipeline = [dict(type='PackClouds')]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='MovingClouds', split='train', num_samples=1800, num_points=256, pipeline=pipeline))
test_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='MovingClouds', split='test', num_samples=600, num_points=256, pipeline=pipeline))
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='MovingClouds', split='val', num_samples=600, num_points=256, pipeline=pipeline))
val_evaluator = test_evaluator = dict(type='Accuracy')
