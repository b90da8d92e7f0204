_base_ = ['../point_mae/point-mae_xs_scratch_modelnet10-1k.py', '../_base_/reparam/rmoe.py']
model = dict(expand=_base_.rmoe)
