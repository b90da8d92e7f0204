_base_ = ['point-bert_xs_ft_modelnet10-1k.py', '../_base_/reparam/ewa.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
