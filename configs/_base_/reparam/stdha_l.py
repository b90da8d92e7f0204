# Overlay: of sixteen heads, two read the keys and values of the frame before and two those of the frame after.
stdha = [dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, -1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])]
