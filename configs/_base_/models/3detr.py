# 3DETR: 2048 tokens, 3 blocks of 256 in the encoder, 8 in the decoder, 256 queries; the losses of ScanNet, whose boxes
# lie along the axes.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='SetEncoder',
        tokenizer=dict(
            type='SetAbstraction', num_points=2048, radius=0.2, num_neighbors=64, widths=(64, 128, 256),
            skip_origin=True),
        embed_dim=256,
        depth=3,
        num_heads=4,
        mlp_ratio=0.5,
        proj_drop=0.1,
        attn_drop=0.1),
    neck=dict(
        type='QueryDecoder', num_queries=256, depth=8, num_heads=4, mlp_ratio=1.0, proj_drop=0.1, attn_drop=0.1,
        project_depth=3),
    head=dict(
        type='DETRHead',
        num_angle_bins=1,
        dropout=0.3,
        costs=dict(giou=2.0, sem_cls=1.0, center=0.0, objectness=0.0),
        loss_weights=dict(
            sem_cls=1.0, no_object=0.25, center=5.0, size=1.0, giou=1.0, angle_cls=0.1, angle_reg=0.5)))
