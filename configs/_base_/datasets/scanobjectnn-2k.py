# ScanObjectNN with all 2,048 points of a cloud, as Point-MAE is fine-tuned; not normalised. In training they are
# shuffled, so that the model's centres, which are sampled from the first point on, differ each time.
# A leaf config chooses the variant (by default the hardest, PB_T50_RS):
#     train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(variant='objbg'))
train_pipeline = [
    dict(type='Resample', num_points=2048, method='random'),
    dict(type='RandomScale', scale=(2 / 3, 3 / 2)),
    dict(type='RandomShift', shift=0.2),
    dict(type='Pack'),
]
test_pipeline = [
    dict(type='Resample', num_points=2048, method='fps'),
    dict(type='Pack'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    persistent_workers=True,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='ScanObjectNN', variant='hardest', split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=64,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ScanObjectNN', variant='hardest', split='test', pipeline=test_pipeline))
# There is no validation split: the test split is looked at while training, and the last epoch is what is reported.
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
