_base_ = ['../point_mae/point-mae_xs_scratch_modelnet10-1k.py', '../_base_/reparam/repa.py']
model = dict(expand=_base_.repa25)
