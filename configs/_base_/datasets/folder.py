# Your own clouds: data_root/{train,test}/<class>/*, or <class>/{train,test}/*; formats: see FolderPointCloud.
# The number of classes flows to the head. Clouds with fewer points than are asked for repeat some.
# Elsewhere: --cfg-options {train,val,test}_dataloader.dataset.data_root=FOLDER
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=1024, method='random', pad='repeat'),
    dict(type='RandomScale', scale=(2 / 3, 3 / 2)),
    dict(type='RandomShift', shift=0.2),
    dict(type='Pack'),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=1024, method='fps', pad='repeat'),
    dict(type='Pack'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='FolderPointCloud', data_root='data/my_clouds', split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='FolderPointCloud', data_root='data/my_clouds', split='test', pipeline=test_pipeline))
# With a val/ level, give val_dataloader the split 'val': the best epoch is then chosen there.
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
