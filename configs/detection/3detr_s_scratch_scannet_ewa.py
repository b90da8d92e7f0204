_base_ = ['3detr_s_scratch_scannet.py', '../_base_/reparam/ewa_detection.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
