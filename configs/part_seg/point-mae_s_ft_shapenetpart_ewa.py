_base_ = ['point-mae_s_ft_shapenetpart.py', '../_base_/reparam/ewa.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
