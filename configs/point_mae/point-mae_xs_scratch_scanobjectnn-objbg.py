# The CPU-sized Point-MAE classifier from scratch on ScanObjectNN, OBJ_BG, at 1,024 points.
# Files of the same layout elsewhere: --cfg-options {train,val,test}_dataloader.dataset.data_root=FOLDER
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-mae_xs_cls.py', '../_base_/datasets/scanobjectnn-1k.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
train_dataloader = val_dataloader = test_dataloader = dict(dataset=dict(variant='objbg'))
