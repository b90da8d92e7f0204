# CIFAR-10 as sequences of pixels: no augmentation; the scale is that of S4's recipe. The test split is looked at while
# training, and the last epoch is what is reported.
pipeline = [dict(type='PackImage', mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    drop_last=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CIFAR10', data_root='data/cifar-10-batches-py', split='train', pipeline=pipeline))
test_dataloader = dict(
    batch_size=128,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='CIFAR10', data_root='data/cifar-10-batches-py', split='test', pipeline=pipeline))
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy')
