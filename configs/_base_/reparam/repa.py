# Overlay: channel-idle FFNs (RePaViT) in every block, in the batch-norm form; its layer norms and shortcuts fold too.
# At the FFNs, at='backbone.blocks.*.mlp', it is the norm-free form, for existing models.
repa = [dict(type='RePaFFN', at='backbone.blocks.*', idle_ratio=0.5)]
repa25 = [dict(type='RePaFFN', at='backbone.blocks.*', idle_ratio=0.25)]
