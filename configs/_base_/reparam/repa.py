# Overlay: channel-idle FFNs (RePaViT) in every block, in the batch-norm form; its layer norms and shortcuts fold too.
# For a quarter instead of half of the channels: --cfg-options "model.expand.0.idle_ratio=0.25".
repa = [dict(type='RePaFFN', at='backbone.blocks.*', idle_ratio=0.5)]
# The norm-free form, for the FFNs of existing models.
repa_free = [dict(type='RePaFFN', at='backbone.blocks.*.mlp', idle_ratio=0.5)]
