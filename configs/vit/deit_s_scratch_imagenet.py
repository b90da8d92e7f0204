# DeiT-S from scratch on ImageNet-1k with the official hyper-parameters, on 16 processes of 64 images.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/deit_s_cls.py', '../_base_/datasets/imagenet-224.py',
    '../_base_/schedules/adamw_cosine_deit.py'
]
model = dict(data_preprocessor=dict(mixup=0.8, cutmix=1.0), head=dict(label_smoothing=0.1))
