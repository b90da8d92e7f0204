# The CPU-sized Point-BERT, pretrained by point-bert_xs_pt_modelnet10.py, fine-tuned on ModelNet10.
# With a tenth of the labels: --cfg-options train_dataloader.dataset.label_fraction=0.1
_base_ = [
    '../_base_/runtime.py', '../_base_/models/point-bert_xs_cls.py', '../_base_/datasets/modelnet10-1k.py',
    '../_base_/schedules/adamw_cosine_xs.py'
]
model = dict(pretrained='work_dirs/point-bert_xs_pt_modelnet10/epoch_30.pth')
