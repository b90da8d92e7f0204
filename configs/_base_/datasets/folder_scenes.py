# Your own scenes with boxes: data_root/{train,val}/*, a cloud and a JSON file each; see FolderScenes. 8,192 points.
# The number of classes flows to the head. Lengths are metres: scale clouds and boxes where they are not.
# Elsewhere: --cfg-options {train,val,test}_dataloader.dataset.data_root=FOLDER
train_pipeline = [
    dict(type='Resample', num_points=8192, method='random', pad='repeat'),
    dict(type='SceneFlip', axes='xy'),
    dict(type='SceneRotate', degrees=180),
    dict(type='SceneScale', scale=(0.9, 1.1)),
    dict(type='PackBoxes'),
]
test_pipeline = [
    dict(type='Resample', num_points=8192, method='random', pad='repeat'),
    dict(type='PackBoxes'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='FolderScenes', data_root='data/my_scenes', split='train', pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='FolderScenes', data_root='data/my_scenes', split='val', pipeline=test_pipeline))
val_evaluator = test_evaluator = dict(type='BoxAP')
