# EWA over channel-idle FFNs: experts are averaged first and folded after.
_base_ = ['../point_mae/point-mae_xs_scratch_modelnet10-1k.py', '../_base_/reparam/repa.py', '../_base_/reparam/ewa.py']
model = dict(expand=_base_.repa + _base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
