_base_ = ['point-mae_xs_scratch_modelnet10-1k.py', '../_base_/reparam/ema.py']
default_hooks = dict(ema=_base_.ema_hook)
