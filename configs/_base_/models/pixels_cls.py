# The model of S4D's minimal recipe, its mixers left to a rule: pixels as 1,024 tokens, 4 blocks of 128, mean pool.
model = dict(
    type='TaskModel',
    data_preprocessor=dict(type='ImagePreprocessor'),
    backbone=dict(type='SequenceEncoder', img_size=32, embed_dim=128, depth=4, num_heads=4, dropout=0.1),
    neck=dict(type='TokenPool', mode='mean'),
    head=dict(type='ClsHead', form='linear'))
