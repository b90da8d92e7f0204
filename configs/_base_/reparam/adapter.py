# Overlay: ZeroI2V's four linear adapters in each block of a backbone that is otherwise frozen but for its final norm.
adapter = [
    dict(type='LinearAdapter', at='backbone.blocks.*.attn.qkv', position='before', scale=0.5, dropout=0.1),
    dict(type='LinearAdapter', at='backbone.blocks.*.attn.proj', position='after', scale=0.5, dropout=0.1),
    dict(type='LinearAdapter', at='backbone.blocks.*.mlp.fc1', position='before', scale=0.5, dropout=0.1),
    dict(type='LinearAdapter', at='backbone.blocks.*.mlp.fc2', position='after', scale=0.5, dropout=0.1),
]
adapter_trainable = ['adapter', 'temporal_embed', 'backbone.norm.*', 'head']
