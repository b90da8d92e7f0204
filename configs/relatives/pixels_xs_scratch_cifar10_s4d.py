# The same for about an hour on one CPU core with some 5,000 training images: half the width, a quarter of the states.
_base_ = 'pixels_s_scratch_cifar10_s4d.py'
model = dict(
    backbone=dict(embed_dim=64),
    expand=[
        dict(type='S4D', at='backbone.blocks.*.attn', d_state=16, bidirectional=False, dropout=0.1, length=1024)
    ])
train_cfg = dict(max_epochs=25)
