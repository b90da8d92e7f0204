# Overlay: the naive mixture of moe.py, averaged in the first half of the training; then its experts specialise.
moe_early_ewa = [dict(type='MoEFFN', at='backbone.blocks.*.mlp', every=2, num_experts=4, top_k=2, capacity_factor=1.25,
                      eval_capacity_factor=2.0, balance_weight=0.01, z_weight=1e-3)]
moe_early_ewa_hook = dict(type='EWAHook', share_rate=0.3, schedule='linear', end=0.5)
