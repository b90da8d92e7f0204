# Like PointMamba: the tokens along two curves, one after the other.
_base_ = ['../point_mae/point-mae_xs_scratch_modelnet10-1k.py', '../_base_/reparam/s4d.py']
model = dict(backbone=dict(order=_base_.s4d_two_orders), expand=_base_.s4d_two)
