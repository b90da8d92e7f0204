_base_ = ['vit_xs_scratch_cifar10.py', '../_base_/reparam/moe.py']
model = dict(expand=_base_.moe)
