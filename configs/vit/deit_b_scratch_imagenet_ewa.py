_base_ = ['deit_s_scratch_imagenet.py', '../_base_/reparam/ewa.py']
model = dict(backbone=dict(name='deit_base_patch16_224'), expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
