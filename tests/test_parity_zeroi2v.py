"""ZeroI2V against stored results of the published model, and its weights both ways."""
import numpy as np
import pytest
import torch

from ewa3d import fuse
from ewa3d.layers.temporal import STDHA
from ewa3d.models.task import TaskModel
from ewa3d.models.weights import layouts_of, load_plain, rename

TIGHT = dict(rtol=3e-5, atol=3e-5)


@pytest.fixture(scope='module')
def zeroi2v(reference):
    pytest.importorskip('timm')
    fixture = reference('zeroi2v')
    fixture.checkpoint = torch.load(fixture.path / 'checkpoint.pth', weights_only=True)
    return fixture


@pytest.fixture
def model(zeroi2v):
    cfg, state = zeroi2v.meta['config'], zeroi2v.checkpoint['state_dict']
    heads, shift = cfg['heads'], cfg['heads'] // cfg['stdha_cfg']['shift_div']
    backbone = dict(type='TimmVideoBackbone', name='vit_base_patch16_clip_quickgelu_224', embed_dim=cfg['width'],
                    num_frames=cfg['num_frames'], img_size=cfg['input_resolution'], patch_size=cfg['patch_size'],
                    depth=cfg['layers'], num_heads=heads)
    rules = [dict(type='STDHA', at='backbone.blocks.*.attn',
                  offsets=[-1] * shift + [1] * shift + [0] * (heads - 2 * shift))]
    rules += [dict(type='LinearAdapter', at=f'backbone.blocks.*.{at}', position=position, scale=cfg['adapter_scale'])
              for at, position in (('attn.qkv', 'before'), ('attn.proj', 'after'), ('mlp.fc1', 'before'),
                                   ('mlp.fc2', 'after'))]
    model = TaskModel(backbone, dict(type='ClipPool'),
                      dict(type='I3DHead', num_classes=len(state['cls_head.fc_cls.bias'])), expand=rules)
    report = load_plain(model, zeroi2v.checkpoint)
    assert report.layout == 'zeroi2v' and not report.missing and not report.unexpected
    return model.eval()


def video_of(fixture):
    return dict(video=fixture.inputs['video'].transpose(1, 2))  # (B, 3, T, H, W) there


def test_every_stage(model, zeroi2v):
    found, handles = {}, []

    def keep(name):
        return lambda module, inputs, output: found.__setitem__(name, output)

    handles.append(model.backbone.norm_pre.register_forward_hook(keep('ln_pre')))
    for i, block in enumerate(model.backbone.blocks):
        handles.append(block.register_forward_hook(keep(f'block_{i}')))
        handles.append(block.attn.proj.register_forward_pre_hook(  # before the layer that S_Adapter stands behind
            lambda module, inputs, i=i: found.__setitem__(f'block_{i}/attention', torch.nn.functional.linear(
                inputs[0], module.weight, module.bias))))
    with torch.no_grad():
        found['features'] = model.extract(video_of(zeroi2v)).transpose(1, 2)
    for name, value in found.items():
        expected = zeroi2v.expected[name]
        value = value.transpose(0, 1) if name.startswith('block') else value  # (n, B·T, C) there
        torch.testing.assert_close(value, expected, **TIGHT, msg=lambda text, name=name: f'{name}: {text}')


@torch.no_grad()
def test_merged(model, zeroi2v):
    fuse(model)
    torch.testing.assert_close(model.extract(video_of(zeroi2v)).transpose(1, 2), zeroi2v.expected['merged_features'],
                               **TIGHT)
    theirs = rename(model.state_dict(), 'zeroi2v', reverse=True)
    merged = {key: value for key, value in zeroi2v.expected.items() if key.startswith('merged/')}
    assert merged
    for key, value in merged.items():
        torch.testing.assert_close(theirs[key.replace('merged/', 'backbone.')], value, **TIGHT)


def test_names_both_ways(model, zeroi2v):
    state = zeroi2v.checkpoint['state_dict']
    assert layouts_of(state) == ['zeroi2v']
    back = rename(model.state_dict(), 'zeroi2v', reverse=True)
    assert back.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize(('name', 'offsets'), [
    ('pm1', [-1, 1, 0, 0, 0, 0, 0, 0]), ('pm1_long_left', [-1, 1, -2, 0, 0, 0, 0, 0]),
    ('pm1_long_both', [-1, 1, -2, 2, 0, 0, 0, 0]), ('none', [0] * 8)])
def test_head_layouts(zeroi2v, name, offsets):
    weights = {key.removeprefix('attention_block.'): value for key, value in
               zeroi2v.checkpoint['attention_block'].items()}
    tokens = zeroi2v.inputs['tokens'].transpose(0, 1)  # (B·T, n, C)
    attention = STDHA(tokens.shape[-1], 8, offsets, num_frames=len(tokens) // 2, qkv_bias=True).eval()
    attention.load_state_dict({key.replace('in_proj_', 'qkv.').replace('out_proj', 'proj'): value
                               for key, value in weights.items()})
    with torch.no_grad():
        got = attention(tokens).transpose(0, 1)
    np.testing.assert_allclose(got, zeroi2v.expected[f'attention/{name}'], **TIGHT)
