_base_ = ['3detr_xs_scratch_folder-scenes.py', '../_base_/reparam/ewa_detection.py']
model = dict(expand=_base_.ewa)
default_hooks = dict(ewa=_base_.ewa_hook)
