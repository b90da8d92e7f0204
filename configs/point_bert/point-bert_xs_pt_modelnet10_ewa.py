_base_ = ['point-bert_xs_pt_modelnet10.py', '../_base_/reparam/ewa.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
