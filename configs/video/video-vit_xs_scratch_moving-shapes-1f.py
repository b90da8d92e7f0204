# The control that sees one frame of each clip.
_base_ = 'video-vit_xs_scratch_moving-shapes.py'
model = dict(backbone=dict(tokenizer=dict(num_frames=1)))
mean, std = [0.5, 0.5, 0.5], [0.3, 0.3, 0.3]
train_pipeline = [dict(type='LoadClip', clip_len=1), dict(type='PackClip', mean=mean, std=std)]
test_pipeline = [dict(type='LoadClip', clip_len=1, test=True), dict(type='PackClip', mean=mean, std=std)]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
