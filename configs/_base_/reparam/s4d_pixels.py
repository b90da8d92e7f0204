# Overlay: every attention becomes a causal S4D over the 1,024 pixels of a CIFAR image.
s4d = [dict(type='S4D', at='backbone.blocks.*.attn', d_state=64, bidirectional=False, dropout=0.1, length=1024)]
