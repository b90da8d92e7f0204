# Overlay: of twelve heads, four read the keys and values of the frames up to two before and after.
stdha = [dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, 1, -2, 2, 0, 0, 0, 0, 0, 0, 0, 0])]
