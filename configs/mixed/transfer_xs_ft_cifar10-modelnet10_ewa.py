# The same with EWA in both: the CIFAR-10 run was trained with experts, and they go on as they were.
_base_ = ['joint_xs_scratch_modelnet10.py', '../_base_/reparam/ewa.py']
model = dict(
    pretrained=dict(
        source='work_dirs/joint_xs_scratch_cifar10_ewa/epoch_24.pth',
        parts=['backbone.blocks', 'backbone.norm'],
        strict=False,
        skip_head=True),
    expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
