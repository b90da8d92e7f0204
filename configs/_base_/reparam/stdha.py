# Overlay: of twelve heads, one reads the keys and values of the frame before and one those of the frame after.
stdha = [dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])]
