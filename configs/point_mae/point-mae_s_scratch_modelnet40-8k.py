# As the 1k recipe at 8,192 points and 512 groups.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_cls.py', '../_base_/datasets/modelnet40-8k.py',
    '../_base_/schedules/adamw_cosine.py'
]
model = dict(backbone=dict(tokenizer=dict(num_groups=512)))
