# Few-shot ModelNet10, folds drawn with a fixed seed: no files but ModelNet10's. Sampled as in modelnet10-1k.py.
# Each fold has 20 queries of each class to test on. `python tools/fewshot.py CONFIG --way 5 --shot 10` trains on fold
# after fold; tools/train.py on the one that `fold` names.
train_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=768, method='random'),
    dict(type='RandomScale', scale=(2 / 3, 3 / 2)),
    dict(type='RandomShift', shift=0.2),
    dict(type='Pack'),
]
test_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=1024, method='fps'),
    dict(type='Pack'),
]
base = dict(type='ModelNet', variant=10)
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='FewShot', base=base, way=5, shot=10, fold=0, split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=100,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='FewShot', base=base, way=5, shot=10, fold=0, split='test', pipeline=test_pipeline))
# The queries are looked at after every epoch. The published code reports the best epoch on them: optimistic.
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
