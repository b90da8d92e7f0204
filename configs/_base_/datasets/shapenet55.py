# ShapeNet-55 for pretraining: a random 1,024 of a cloud's 8,192 points, then centred and scaled to the unit sphere.
# Point-MAE trains on the training list (41,952 shapes). Point-BERT trains on both lists:
#     train_dataloader = dict(dataset=dict(whole=True))
# What is measured meanwhile is the model's: a leaf config adds val_evaluator, and ../protocols/svm_modelnet40.py.
train_pipeline = [
    dict(type='Resample', num_points=1024, method='random'),
    dict(type='Normalize'),
    dict(type='RandomScale', scale=(2 / 3, 3 / 2)),
    dict(type='RandomShift', shift=0.2),
    dict(type='Pack'),
]
test_pipeline = [
    dict(type='Resample', num_points=1024, method='random'),
    dict(type='Normalize'),
    dict(type='Pack'),
]
train_dataloader = dict(
    batch_size=128,
    num_workers=4,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ShapeNet55', split='train', pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=128,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ShapeNet55', split='test', pipeline=test_pipeline))
test_dataloader = val_dataloader
