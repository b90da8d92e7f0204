# 3DETR-m on ScanNet: the masked encoder, with half of the tokens behind its first block.
_base_ = ['3detr_s_scratch_scannet.py']
model = dict(
    backbone=dict(
        mask_radius=(0.4, 0.8, 1.2),
        mask_radius_compat=True,
        downsample=dict(
            type='SetAbstraction', num_points=1024, radius=0.4, num_neighbors=32, widths=(256, 256, 256),
            skip_origin=True),
        proj_drop=0.3,
        attn_drop=0.3),
    neck=dict(project_depth=2))
