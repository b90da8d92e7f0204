_base_ = ['../point_mae/point-mae_xs_scratch_modelnet10-1k.py', '../_base_/reparam/repa.py']
model = dict(expand=[dict(type='RePaFFN', at='backbone.blocks.*', idle_ratio=0.25)])
