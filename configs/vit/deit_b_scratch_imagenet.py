# DeiT-B: the recipe of DeiT-S, which its authors use for both.
_base_ = 'deit_s_scratch_imagenet.py'
model = dict(backbone=dict(name='deit_base_patch16_224'))
