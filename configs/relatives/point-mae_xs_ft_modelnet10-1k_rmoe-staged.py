# RMoE, stage 2, from the mixture that stage 1 (point-mae_xs_pt_modelnet10_rmoe.py) left.
_base_ = ['../point_mae/point-mae_xs_ft_modelnet10-1k.py', '../_base_/reparam/rmoe.py']
model = dict(expand=_base_.rmoe, pretrained='work_dirs/point-mae_xs_pt_modelnet10_rmoe/epoch_8.pth')
