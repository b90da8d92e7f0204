# CIFAR-10 in its official Python batches, 32 × 32; a part of it in the same files is as good. The test split is
# looked at while training, and the last epoch is what is reported.
mean, std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
train_pipeline = [
    dict(
        type='ImageTransforms',
        transforms=[dict(name='RandomCrop', size=32, padding=4), dict(name='RandomHorizontalFlip')]),
    dict(type='PackImage', mean=mean, std=std),
]
test_pipeline = [dict(type='PackImage', mean=mean, std=std)]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CIFAR10', data_root='data/cifar-10-batches-py', split='train', pipeline=train_pipeline))
test_dataloader = dict(
    batch_size=128,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='CIFAR10', data_root='data/cifar-10-batches-py', split='test', pipeline=test_pipeline))
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
