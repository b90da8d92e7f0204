_base_ = ['vit_xs_scratch_digits.py', '../_base_/reparam/ema.py']
default_hooks = dict(ema=_base_.ema_hook)
