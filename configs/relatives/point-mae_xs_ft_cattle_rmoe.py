_base_ = ['point-mae_xs_ft_cattle.py', '../_base_/reparam/rmoe.py']
model = dict(expand=_base_.rmoe)
