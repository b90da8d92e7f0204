# RePaViT's batch-norm form, half of the channels idle, in every block.
_base_ = ['vit_xs_scratch_cifar10.py', '../_base_/reparam/repa.py']
model = dict(expand=_base_.repa)
