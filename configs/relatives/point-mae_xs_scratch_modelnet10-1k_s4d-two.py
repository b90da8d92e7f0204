# Like PointMamba: the tokens along two curves, one after the other; positions are added once, the head sees the mean of
# the tokens.
_base_ = ['../point_mae/point-mae_xs_scratch_modelnet10-1k.py', '../_base_/reparam/s4d.py']
model = dict(
    backbone=dict(pos='first', cls_token=False, order=_base_.s4d_two_orders),
    neck=dict(mode='mean'),
    expand=_base_.s4d_two)
