# The same model, trained with EWA: every second FFN is four experts while it trains, one FFN afterwards.
_base_ = ['plain.py', '../_base_/reparam/ewa.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
