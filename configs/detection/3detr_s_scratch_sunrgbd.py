# 3DETR on SUN RGB-D: turned boxes in 12 heading bins, 128 queries, no GIoU in the loss, 1080 epochs at 7e-4.
_base_ = [
    '../_base_/runtime.py',
    '../_base_/models/3detr.py',
    '../_base_/datasets/sunrgbd.py',
    '../_base_/schedules/adamw_cosine_detr.py'
]
model = dict(
    neck=dict(num_queries=128),
    head=dict(
        num_angle_bins=12,
        costs=dict(giou=3.0, center=5.0, objectness=5.0),
        loss_weights=dict(giou=0.0, no_object=0.1)))
optim_wrapper = dict(optimizer=dict(lr=7e-4))
