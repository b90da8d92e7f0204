# Overlay: every second FFN of the encoder and of the decoder becomes four experts.
# It defines names of its own only; a leaf config puts them where they belong (see any *_ewa.py).
ewa = [
    dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=2, num_experts=4),
    dict(type='EWAFFN', at='neck.blocks.*.mlp', every=2, num_experts=4)
]
ewa_hook = dict(type='EWAHook', share_rate=0.3, schedule='linear')
