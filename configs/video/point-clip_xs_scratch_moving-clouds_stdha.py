_base_ = ['point-clip_xs_scratch_moving-clouds.py', '../_base_/reparam/stdha_xs.py']
model = dict(expand=_base_.stdha)
