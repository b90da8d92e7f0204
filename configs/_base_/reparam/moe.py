# Overlay: every second FFN of the backbone becomes a naive mixture of four experts, two a token, which stays one.
# A token costs two FFNs: with top_k=1 it costs one.
moe = [dict(type='MoEFFN', at='backbone.blocks.*.mlp', every=2, num_experts=4, top_k=2, capacity_factor=1.25,
            eval_capacity_factor=2.0, balance_weight=0.01, z_weight=1e-3)]
