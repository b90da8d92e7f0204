# 3DETR on ScanNet: 1080 epochs at 5e-4. train_cfg.max_epochs=90 is the published quick check.
_base_ = [
    '../_base_/runtime.py',
    '../_base_/models/3detr.py',
    '../_base_/datasets/scannet_detection.py',
    '../_base_/schedules/adamw_cosine_detr.py'
]
