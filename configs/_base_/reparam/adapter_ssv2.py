# Overlay: as adapter.py, with the scale and without the dropout that ZeroI2V's ViT-B has on Something-Something v2.
adapter = [
    dict(type='LinearAdapter', at='backbone.blocks.*.attn.qkv', position='before', scale=1.0, dropout=0.0),
    dict(type='LinearAdapter', at='backbone.blocks.*.attn.proj', position='after', scale=1.0, dropout=0.0),
    dict(type='LinearAdapter', at='backbone.blocks.*.mlp.fc1', position='before', scale=1.0, dropout=0.0),
    dict(type='LinearAdapter', at='backbone.blocks.*.mlp.fc2', position='after', scale=1.0, dropout=0.0),
]
adapter_trainable = ['adapter', 'temporal_embed', 'backbone.norm.*', 'head']
