# Overlay: every attention becomes an S4D in two directions over 32 patch tokens, visited along a Hilbert curve, and the
# class token. Its state spaces learn at 1e-3 at most and without decay (ssm_lr in paramwise_cfg).
s4d = [dict(type='S4D', at='backbone.blocks.*.attn', d_state=64, bidirectional=True, length=33)]
s4d_order = 'hilbert'
# Two curves, one after the other (PointMamba): every patch token comes twice; there is no class token.
s4d_two = [dict(type='S4D', at='backbone.blocks.*.attn', d_state=64, bidirectional=True, length=64)]
s4d_two_orders = ['hilbert', 'hilbert-trans']
