_base_ = ['vit_xs_scratch_digits.py', '../_base_/reparam/moe_ewa.py']
model = dict(expand=_base_.moe_ewa)
default_hooks = dict(ewa=_base_.moe_ewa_hook)
