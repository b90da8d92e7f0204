_base_ = ['../point_mae/point-mae_xs_scratch_modelnet10-1k.py', '../_base_/reparam/moe_ewa.py']
model = dict(expand=_base_.moe_ewa)
default_hooks = dict(ewa=_base_.moe_ewa_hook)
