# Sequential CIFAR-10, S4D's minimal recipe: 0.2 M parameters, one pixel a token, no augmentation.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/pixels_cls.py', '../_base_/datasets/cifar10-pixels.py',
    '../_base_/schedules/adamw_cosine_s4d.py', '../_base_/reparam/s4d_pixels.py'
]
model = dict(expand=_base_.s4d)
