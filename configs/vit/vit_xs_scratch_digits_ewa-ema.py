_base_ = ['vit_xs_scratch_digits.py', '../_base_/reparam/ewa.py', '../_base_/reparam/ema.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook, ema=_base_.ema_hook)
