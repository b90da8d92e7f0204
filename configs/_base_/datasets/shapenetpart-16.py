# Sixteen shapes of ShapeNetPart, one of each category, to be learned by heart: the same are trained on and tested.
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=2048, method='random'),
    dict(type='RandomJitter', sigma=0.005, clip=0.02),
    dict(type='Pack', category=True),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='KeepAll'),
    dict(type='Resample', num_points=2048, method='random'),
    dict(type='Pack', category=True),
]
train_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='ShapeNetPart',
        data_root='data/shapenetcore_partanno_segmentation_benchmark_v0',
        split='train',
        pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=16,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(
        type='ShapeNetPart',
        data_root='data/shapenetcore_partanno_segmentation_benchmark_v0',
        split='train',
        pipeline=test_pipeline))
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='PartIoU')
