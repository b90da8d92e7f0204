_base_ = ['point-bert_s_ft_modelnet40-1k.py', '../_base_/reparam/ewa.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
