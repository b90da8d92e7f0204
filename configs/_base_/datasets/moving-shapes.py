# The embedded clips of moving shapes, 8 frames of 32 × 32: the order of the frames decides the class. No download.
# The other two classes turn; a small model tells them apart no better than chance after 4,000 steps.
classes = ['left', 'right', 'up', 'down']
mean, std = [0.5, 0.5, 0.5], [0.3, 0.3, 0.3]
train_pipeline = [dict(type='LoadClip', clip_len=8), dict(type='PackClip', mean=mean, std=std)]
test_pipeline = [dict(type='LoadClip', clip_len=8, test=True), dict(type='PackClip', mean=mean, std=std)]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='MovingShapes', split='train', num_samples=6000, classes=classes, pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='MovingShapes', split='test', num_samples=600, classes=classes, pipeline=test_pipeline))
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='MovingShapes', split='val', num_samples=600, classes=classes, pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='Accuracy')
