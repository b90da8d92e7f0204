"""Pixels as a sequence."""
import pytest
import torch
from toys import train_steps

from ewa3d import fuse
from ewa3d.engine.params import param_groups
from ewa3d.fusing import image_shape
from ewa3d.layers.ssm import S4D
from ewa3d.models.sequence import SequenceEncoder
from ewa3d.registry import MODELS

BACKBONE = dict(type='SequenceEncoder', img_size=(3, 4), in_channels=2, embed_dim=8, depth=2, num_heads=2)
CONFIG = dict(type='TaskModel', backbone=BACKBONE, data_preprocessor=dict(type='ImagePreprocessor'),
              neck=dict(type='TokenPool', mode='mean'), head=dict(type='ClsHead', num_classes=3, form='linear'),
              expand=[dict(type='S4D', at='backbone.blocks.*.attn', d_state=4, bidirectional=False, length=12)])


def test_is_the_definition():
    model = SequenceEncoder((3, 4), 2, 8, 2, 2).eval()
    img = torch.randn(2, 2, 3, 4)
    x = torch.stack([model.embed(img[:, :, i // 4, i % 4]) for i in range(12)], 1)
    for block in model.blocks:
        x = block.norm(x + block.attn(x))
    torch.testing.assert_close(model(dict(img=img)), x)


def test_classifier_sees_pixels_in_order_and_fuses():
    model = MODELS.build(CONFIG).double()
    assert sum(isinstance(module, S4D) for module in model.modules()) == 2
    img = dict(img=torch.randn(2, 2, 3, 4, dtype=torch.float64))
    train_steps(model, img)
    model.eval()
    other = dict(img=img['img'].clone())
    other['img'][:, :, 2, 3] += 1  # the last pixel
    features = [model.backbone(x)[:, :-1] for x in (img, other)]
    torch.testing.assert_close(*features, rtol=0, atol=1e-12)
    before = model(img)
    assert {row.status for row in fuse(model)} == {'fused'}
    torch.testing.assert_close(model(img), before, rtol=0, atol=1e-12)


def test_groups_of_the_recipe():
    groups = {group['name']: group for group in param_groups(MODELS.build(CONFIG), 1e-2, 0.01)}
    assert {name: (group['lr'], group['weight_decay']) for name, group in groups.items()} == {
        'decay': (1e-2, 0.01), 'no_decay': (1e-2, 0.), 'ssm.no_decay': (1e-3, 0.)}
    assert len(groups['ssm.no_decay']['params']) == 6


def test_shape_for_generated_inputs():
    assert image_shape(BACKBONE) == (2, 3, 4)


@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(img_size=0), ValueError, 'img_size'), (dict(embed_dim=0), ValueError, 'embed_dim must be at least 1'),
    (dict(depth='4'), TypeError, 'depth must be an integer'), (dict(dropout=1), ValueError, 'dropout must lie in')])
def test_settings_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        SequenceEncoder(**options)


def test_other_images_are_refused():
    model = SequenceEncoder(4, 3, 8, 1, 2)
    with pytest.raises(ValueError, match=r'images \(B, 3, 4, 4\) expected, got \(1, 3, 4, 5\)'):
        model(dict(img=torch.randn(1, 3, 4, 5)))
    with pytest.raises(KeyError, match="need the key 'img'"):
        model(dict(points=torch.randn(1, 3, 4)))
