_base_ = ['video-vit_xs_scratch_moving-shapes.py', '../_base_/reparam/stdha_xs.py']
model = dict(expand=_base_.stdha)
