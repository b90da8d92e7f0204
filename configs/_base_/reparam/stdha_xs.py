# Overlay for four heads: one reads the keys and values of the frame before, one those of the frame after.
stdha = [dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, 1, 0, 0])]
