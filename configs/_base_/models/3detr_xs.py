# A query detector for a CPU: 512 tokens, 3 blocks of 96 in the encoder, 3 in the decoder, 96 queries, 12 heading bins.
# Queries start from the tokens around them: 3DETR's, which start from zero, take many times the steps to find anything.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='Preprocessor'),
    backbone=dict(
        type='SetEncoder',
        tokenizer=dict(type='SetAbstraction', num_points=512, radius=0.3, num_neighbors=24, widths=(32, 64, 96)),
        embed_dim=96,
        depth=3,
        num_heads=4,
        mlp_ratio=2.0,
        proj_drop=0.0,
        attn_drop=0.0),
    neck=dict(
        type='QueryDecoder', num_queries=96, depth=3, num_heads=4, mlp_ratio=2.0, proj_drop=0.0, attn_drop=0.0,
        project_depth=2, content=dict(type='SetAbstraction', radius=1.0, num_neighbors=48)),
    head=dict(
        type='DETRHead',
        num_angle_bins=12,
        dropout=0.1,
        costs=dict(giou=2.0, sem_cls=1.0, center=5.0, objectness=0.0),
        loss_weights=dict(
            sem_cls=1.0, no_object=0.1, center=5.0, size=1.0, giou=1.0, angle_cls=0.1, angle_reg=0.5)))
