# Your own clouds with a part for every point: data_root/{train,test}/<category>/*, and parts.json; see FolderParts.
# The numbers of categories and parts flow to the model. Clouds with fewer points than are asked for repeat some.
# Elsewhere: --cfg-options {train,val,test}_dataloader.dataset.data_root=FOLDER
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=1024, method='random', pad='repeat'),
    dict(type='RandomScale', scale=(0.8, 1.25)),
    dict(type='RandomShift', shift=0.1),
    dict(type='Pack', category=True),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='KeepAll'),
    dict(type='Resample', num_points=1024, method='fps', pad='repeat'),
    dict(type='Pack', category=True),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=1,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='FolderParts', data_root='data/my_parts', split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='FolderParts', data_root='data/my_parts', split='test', pipeline=test_pipeline))
# With a val/ level, give val_dataloader the split 'val': the best epoch is then chosen there.
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='PartIoU')
