# Overlay: every second FFN of the backbone is the learnable softmax average of four (ExFusion), fused after training.
exfusion = [dict(type='FusionFFN', at='backbone.blocks.*.mlp', every=2, num_experts=4)]
