# Overlay: every second FFN of the backbone becomes a core with four residual experts, two a token (RMoE).
# It starts as the dense model; `freeze_core=True` in the rule, or core_lr_mult below 1, spares the core.
rmoe = [dict(type='ResidualMoEFFN', at='backbone.blocks.*.mlp', every=2, num_experts=4, top_k=2, balance_weight=0.01,
             z_weight=1e-3)]
# The intermediate stage trains the residuals and the router beside what is not a core.
rmoe_frozen = [dict(type='ResidualMoEFFN', at='backbone.blocks.*.mlp', every=2, num_experts=4, top_k=2,
                    balance_weight=0.01, z_weight=1e-3, freeze_core=True)]
