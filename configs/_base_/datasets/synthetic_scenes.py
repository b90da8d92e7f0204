# The embedded rooms with furniture of 6 classes and turned boxes, seen from three places: made from a seed.
scene_cfg = dict(views=3)
train_pipeline = [
    dict(type='SceneFlip', axes='xy'),
    dict(type='SceneRotate', degrees=180),
    dict(type='SceneScale', scale=(0.9, 1.1)),
    dict(type='PackBoxes'),
]
test_pipeline = [dict(type='PackBoxes')]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='SyntheticScenes',
        split='train',
        num_samples=800,
        num_points=4096,
        scene_cfg=scene_cfg,
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='SyntheticScenes',
        split='val',
        num_samples=100,
        num_points=4096,
        scene_cfg=scene_cfg,
        pipeline=test_pipeline))
test_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='SyntheticScenes',
        split='test',
        num_samples=200,
        num_points=4096,
        scene_cfg=scene_cfg,
        pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='BoxAP')
