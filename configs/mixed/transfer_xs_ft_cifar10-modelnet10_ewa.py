# From the same dense weights; the experts start as copies of their FFNs.
_base_ = ['transfer_xs_ft_cifar10-modelnet10.py', '../_base_/reparam/ewa.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
