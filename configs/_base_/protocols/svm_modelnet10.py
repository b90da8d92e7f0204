# Overlay: at every validation, the accuracy on ModelNet10's test split of a linear SVM on frozen features of its
# training split. A leaf config adds `default_hooks = dict(svm=_base_.svm_hook)`.
svm_pipeline = [
    dict(type='Normalize'),
    dict(type='Resample', num_points=1024, method='fps'),
    dict(type='Pack'),
]
svm_training = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ModelNet', variant=10, split='train', pipeline=svm_pipeline))
svm_testing = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='ModelNet', variant=10, split='test', pipeline=svm_pipeline))
svm_hook = dict(
    type='LinearSVMHook', train_dataloader=svm_training, test_dataloader=svm_testing, C=1.0)
