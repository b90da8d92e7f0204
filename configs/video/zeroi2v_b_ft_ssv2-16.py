# 64 clips a step are 16 processes of 4, or accumulative_counts.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/zeroi2v_b_cls.py', '../_base_/datasets/ssv2-16.py',
    '../_base_/schedules/adamw_cosine_video.py', '../_base_/reparam/stdha_long.py', '../_base_/reparam/adapter_ssv2.py'
]
model = dict(
    backbone=dict(num_frames=16),
    head=dict(label_smoothing=0.1),
    expand=_base_.stdha + _base_.adapter,
    trainable=_base_.adapter_trainable)
param_scheduler = dict(warmup=2.5 / 50)
train_cfg = dict(max_epochs=50)
