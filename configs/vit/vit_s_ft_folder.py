# A pretrained ViT-S fine-tuned on your own images. Weights: model.backbone.checkpoint=FILE, a .safetensors or .pth in
# timm's or torchvision's layout; without it this is training from scratch.
_base_ = [
    '../_base_/runtime.py', '../_base_/models/deit_s_cls.py', '../_base_/datasets/image_folder-224.py',
    '../_base_/schedules/adamw_cosine_ft.py'
]
model = dict(
    backbone=dict(name='vit_small_patch16_224', checkpoint=None),
    head=dict(label_smoothing=0.1))
