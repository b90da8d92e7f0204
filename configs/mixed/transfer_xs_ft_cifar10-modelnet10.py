# ModelNet10 from the blocks of a ViT that was trained on CIFAR-10; its tokenizer, class token and head start anew. The
# log says what was loaded. From scratch: joint_xs_scratch_modelnet10.py.
_base_ = 'joint_xs_scratch_modelnet10.py'
model = dict(
    pretrained=dict(
        source='work_dirs/joint_xs_scratch_cifar10/epoch_24.pth',
        parts=['backbone.blocks', 'backbone.norm'],
        strict=False,
        skip_head=True))
