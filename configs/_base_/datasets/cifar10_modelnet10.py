# CIFAR-10 and ModelNet10 in turns: batches of one of them, in a random sequence; every epoch goes through each once, so
# that each task takes as many steps as when it is trained alone. weights=dict(cifar10=1, modelnet10=1) in the training
# sampler would draw both equally often.
img_mean, img_std = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
img_train = [
    dict(
        type='ImageTransforms',
        transforms=[dict(name='RandomCrop', size=32, padding=4), dict(name='RandomHorizontalFlip')]),
    dict(type='PackImage', mean=img_mean, std=img_std),
]
img_test = [dict(type='PackImage', mean=img_mean, std=img_std)]
points_train = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=768, method='random'),
    dict(type='RandomScale', scale=(2 / 3, 3 / 2)),
    dict(type='RandomShift', shift=0.2),
    dict(type='Pack'),
]
points_test = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=1024, method='fps'),
    dict(type='Pack'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='MixedSampler'),
    batch_sampler=dict(type='MixedBatches', batch_sizes=dict(cifar10=64, modelnet10=32)),
    dataset=dict(
        type='MixedDataset',
        sources=dict(
            cifar10=dict(type='CIFAR10', data_root='data/cifar-10-batches-py', split='train', pipeline=img_train),
            modelnet10=dict(type='ModelNet', variant=10, split='train', pipeline=points_train))))
test_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='MixedSampler', shuffle=False),
    batch_sampler=dict(type='MixedBatches'),
    dataset=dict(
        type='MixedDataset',
        sources=dict(
            cifar10=dict(type='CIFAR10', data_root='data/cifar-10-batches-py', split='test', pipeline=img_test),
            modelnet10=dict(type='ModelNet', variant=10, split='test', pipeline=points_test))))
# The test splits are looked at while training, and the last epoch is what is reported.
val_dataloader = test_dataloader
val_evaluator = test_evaluator = dict(
    type='TaskMetrics', tasks=dict(cifar10=dict(type='Accuracy'), modelnet10=dict(type='Accuracy')))
