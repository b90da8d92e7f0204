# RMoE, stage 2, from the dense checkpoint of stage 0: the mixture appears with the downstream task.
_base_ = ['../point_mae/point-mae_xs_ft_modelnet10-1k.py', '../_base_/reparam/rmoe.py']
model = dict(expand=_base_.rmoe)
