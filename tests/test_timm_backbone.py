"""timm's models as backbones: calls, weights in and out, errors."""
import copy

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.models import swin_transformer

from ewa3d import expand, fuse
from ewa3d.engine.params import layer_numbers, param_groups
from ewa3d.models.base import build_module
from ewa3d.models.timm_backbone import TimmBackbone, from_torchvision, timm_weights
from ewa3d.registry import MODELS

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2)
VITS = {'vit_tiny_patch16_224': TINY, 'deit_tiny_patch16_224': TINY, 'deit_tiny_distilled_patch16_224': TINY,
        'deit3_small_patch16_224': TINY, 'vit_small_patch14_reg4_dinov2': TINY, 'vit_medium_patch16_gap_240': TINY}
OTHERS = {'eva02_tiny_patch14_224': dict(TINY, num_heads=2), 'beit_base_patch16_224': TINY,
          'swin_tiny_patch4_window7_224': dict(img_size=32, patch_size=2, embed_dim=8, depths=(1, 2), num_heads=(1, 2),
                                               window_size=4)}


def make(name: str, **more) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(name, **{**VITS, **OTHERS}[name], **more).eval()


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize('name', [*VITS, *OTHERS])
def test_gives_what_timm_gives(name):
    backbone, x = make(name), images()
    assert isinstance(backbone, MODELS.get('TimmBackbone'))
    kwargs = {**VITS, **OTHERS}[name]
    plain = timm.create_model(name, num_classes=0, **kwargs).eval()
    plain.load_state_dict(backbone.state_dict(), strict=True)
    feats = backbone(dict(img=x))
    expected = plain.forward_features(x)
    torch.testing.assert_close(feats, expected.flatten(1, 2) if expected.ndim == 4 else expected)
    assert feats.shape[-1] == backbone.embed_dim
    pooled = TimmBackbone(name, pool=True, **kwargs).eval()
    pooled.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(pooled(x), plain(x))
    assert pooled(x).shape == (2, pooled.embed_dim)
    twin = copy.deepcopy(backbone)  # the copy's parts are its own, and it still calls them
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin(x).abs().max() == 0 and torch.equal(backbone(x), feats)


@pytest.mark.parametrize('name', VITS)
def test_tokenize_and_encode(name):
    backbone, x = make(name), images()
    tokens = backbone.tokenize(dict(img=x))
    assert tokens.x.shape == tokens.pos.shape == (2, 16, 24) and tokens.coord.shape == (2, 16, 2)
    torch.testing.assert_close(backbone.encode(tokens.x, tokens.pos), backbone(x))
    torch.testing.assert_close(backbone.encode(tokens.x, tokens.pos, (2, 0)), backbone(x, out_indices=(2, 0)))
    assert backbone.encode(tokens.x[:, :5], tokens.pos[:, :5]).shape == (2, 5 + backbone.num_prefix_tokens, 24)
    with pytest.raises(ValueError, match='not one of the 3 blocks'):
        backbone.encode(tokens.x, tokens.pos, (3,))


def test_images_of_any_size():
    backbone = make('vit_tiny_patch16_224', dynamic_img_size=True)
    x = torch.randn(2, 3, 40, 24)
    tokens = backbone.tokenize(x)
    assert tokens.pos.shape == (2, 15, 24) and tokens.coord.shape == (2, 15, 2)
    torch.testing.assert_close(backbone.encode(tokens.x, tokens.pos), backbone(x))


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'eva02_tiny_patch14_224', 'swin_tiny_patch4_window7_224'])
def test_images_of_another_kind(name):
    backbone = make(name)
    for x in (images(48), images()[:, :1]):
        with pytest.raises(ValueError, match=rf'{name} takes images \(B, 3, 32, 32\), got \(2, '):
            backbone(x)


@pytest.mark.parametrize('name', OTHERS)
def test_models_that_need_more_than_tokens(name):
    backbone, x = make(name), images()
    with pytest.raises(NotImplementedError, match=rf'{name} .* has no tokenize\(\)'):
        backbone.tokenize(x)
    with pytest.raises(NotImplementedError, match=r'has no encode\(\)'):
        backbone.encode(x, x)
    last = 1 if 'swin' in name else 2
    found = backbone(x, out_indices=(last, 0))
    torch.testing.assert_close(found[0], backbone(x))
    assert found[1].shape[1] > found[0].shape[1] if 'swin' in name else found[1].shape == found[0].shape


@pytest.mark.parametrize(('name', 'kwargs', 'shape'), [
    ('vit_tiny_r_s16_p8_224', dict(img_size=32, depth=1), (2, 2, 192)),  # a hybrid: convolutions, then patches
    ('swinv2_cr_tiny_ns_224', dict(img_size=64, window_size=2, depths=(1, 1, 1, 1)), (2, 4, 768)),
    ('naflexvit_base_patch16_gap', dict(depth=1, embed_dim=24, num_heads=2), (2, 16 + 4, 24)),
    ('samvit_base_patch16_224', dict(img_size=64, depth=1, embed_dim=24, num_heads=2, global_attn_indexes=()),
     (2, 16, 24))])
def test_other_transformers_on_patches(name, kwargs, shape):
    backbone = TimmBackbone(name, **kwargs).eval()
    assert backbone(images(kwargs.get('img_size', 64))).shape == shape and backbone.embed_dim == shape[-1]


@pytest.mark.parametrize(('name', 'kwargs'), [
    ('cait_xxs24_224', dict(img_size=32, depth=2)), ('convit_tiny', dict(img_size=32, depth=2, local_up_to_layer=1)),
    ('vit_relpos_small_patch16_224', dict(img_size=32, depth=1, embed_dim=24, num_heads=2))])
def test_blocks_that_timm_gives_without_the_class_token_or_not_at_all(name, kwargs):
    backbone = TimmBackbone(name, **kwargs).eval()
    assert backbone(images()).ndim == 3
    with pytest.raises(NotImplementedError, match=f'{name} .*out_indices cannot be given'):
        backbone(images(), out_indices=(0,))


def test_weights_of_a_whole_model():
    with pytest.raises(ValueError, match='give it to the model, as pretrained='):
        make('vit_tiny_patch16_224').load({'backbone.cls_token': torch.zeros(1, 1, 24)})


def test_modes_and_flags_reach_the_model():
    backbone = make('vit_tiny_patch16_224', drop_rate=0.5)
    assert not backbone.model.training
    backbone.train()
    assert backbone.model.training and all(module.training for module in backbone.modules())
    backbone.double()
    assert backbone(images().double()).dtype == torch.float64
    backbone.init_weights()  # mmengine's would call timm's, which starts anew
    assert backbone.no_weight_decay() >= {'pos_embed', 'cls_token'}


@pytest.mark.parametrize(('name', 'at'), [('vit_tiny_patch16_224', 'backbone.blocks.*.mlp'),
                                          ('deit_tiny_distilled_patch16_224', 'backbone.blocks.*.mlp'),
                                          ('eva02_tiny_patch14_224', 'backbone.blocks.*.mlp'),
                                          ('swin_tiny_patch4_window7_224', 'backbone.layers.*.blocks.*.mlp')])
def test_fused_weights_go_back_into_plain_timm(name, at):
    kwargs = {**VITS, **OTHERS}[name]
    model = MODELS.build(dict(type='TaskModel', backbone=dict(type='TimmBackbone', name=name, pool=True, **kwargs),
                              head=dict(type='ClsHead', form='linear', num_classes=5)))
    expand(model, [dict(type='EWAFFN', at=at, num_experts=2)])
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
    x = images()
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(dict(img=x)).square().mean().backward()
        optimizer.step()
    expected = model.eval()(dict(img=x))
    with pytest.raises(ValueError, match='still has experts'):
        timm_weights(model)
    fuse(model)
    plain = timm.create_model(name, num_classes=5, **kwargs).eval()
    plain.load_state_dict(timm_weights(model), strict=True)
    torch.testing.assert_close(plain(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(('name', 'mode', 'alike'), [
    ('vit_tiny_patch16_224', 'cls', True), ('vit_tiny_patch16_224', 'mean', False),
    ('deit_tiny_distilled_patch16_224', 'cls', False), ('eva02_tiny_patch14_224', 'cls', False),
    ('swin_tiny_patch4_window7_224', 'mean', False)])
def test_the_classifier_goes_along_where_it_sees_the_same(name, mode, alike):
    """A distilled model gives the mean of two tokens, EVA pools before its last norm."""
    kwargs, x = {**VITS, **OTHERS}[name], images()
    model = MODELS.build(dict(type='TaskModel', backbone=dict(type='TimmBackbone', name=name, **kwargs),
                              neck=dict(type='TokenPool', mode=mode),
                              head=dict(type='ClsHead', form='linear', num_classes=5))).eval()
    plain = timm.create_model(name, num_classes=5 if alike else 0, **kwargs).eval()
    plain.load_state_dict(timm_weights(model), strict=True)
    if alike:
        torch.testing.assert_close(plain(x), model(dict(img=x)))


def test_the_classifier_of_averaged_patches():
    name, kwargs, x = 'vit_tiny_patch16_224', dict(TINY, global_pool='avg', fc_norm=False), images()
    model = MODELS.build(dict(type='TaskModel', backbone=dict(type='TimmBackbone', name=name, **kwargs),
                              neck=dict(type='TokenPool', mode='mean'),
                              head=dict(type='ClsHead', form='linear', num_classes=5))).eval()
    plain = timm.create_model(name, num_classes=5, **kwargs).eval()
    plain.load_state_dict(timm_weights(model), strict=True)
    torch.testing.assert_close(plain(x), model(dict(img=x)))


def test_weights_without_a_linear_head():
    backbone = make('vit_tiny_patch16_224')
    assert timm_weights(backbone).keys() == backbone.state_dict().keys()
    with pytest.raises(ValueError, match='a TimmBackbone was expected'):
        timm_weights(torch.nn.Linear(2, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_local_checkpoint_with_positions_resized(tmp_path, suffix):
    source = timm.create_model('vit_tiny_patch16_224', num_classes=7, **TINY).eval()
    file = tmp_path / f'weights{suffix}'
    save_file(source.state_dict(), file) if suffix == '.safetensors' else torch.save(source.state_dict(), file)
    same = TimmBackbone('vit_tiny_patch16_224', checkpoint=file, **TINY).eval()
    x = images()
    torch.testing.assert_close(same(x), source.forward_features(x))
    larger = TimmBackbone('vit_tiny_patch16_224', checkpoint=file, **{**TINY, 'img_size': 48})
    assert larger.model.pos_embed.shape == (1, 37, 24)
    torch.testing.assert_close(larger.model.pos_embed[:, 0], source.pos_embed[:, 0])
    torch.testing.assert_close(larger.model.blocks[2].mlp.fc1.weight, source.blocks[2].mlp.fc1.weight)
    assert build_module(dict(type='TimmBackbone', name='vit_tiny_patch16_224', checkpoint=str(file), **TINY))


def test_weights_of_another_architecture(tmp_path):
    file = tmp_path / 'weights.safetensors'
    save_file(timm.create_model('vit_tiny_patch16_224', **TINY).state_dict(), file)
    swin = 'swin_tiny_patch4_window7_224'
    for name, kwargs in (('vit_tiny_patch16_224', dict(TINY, embed_dim=12)),
                         ('vit_tiny_patch16_224', dict(TINY, depth=4)), (swin, OTHERS[swin])):
        with pytest.raises(ValueError, match=rf'\.safetensors holds the weights of another architecture than {name}'):
            TimmBackbone(name, checkpoint=file, **kwargs)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        TimmBackbone('vit_tiny_patch16_224', checkpoint=tmp_path / 'nowhere.pth', **TINY)


def test_torchvision_vit():
    source = torchvision.models.VisionTransformer(32, 8, num_layers=3, num_heads=2, hidden_dim=24, mlp_dim=96,
                                                  num_classes=5).eval()
    torch.nn.init.normal_(source.heads.head.weight, std=0.2)
    backbone = TimmBackbone('vit_tiny_patch16_224', pool=True, **TINY).eval()
    backbone.load(source.state_dict())
    x = images()
    torch.testing.assert_close(source.heads(backbone(x)), source(x), atol=1e-5, rtol=1e-5)
    larger = TimmBackbone('vit_tiny_patch16_224', **{**TINY, 'img_size': 48})
    larger.load(source.state_dict())
    torch.testing.assert_close(larger.model.pos_embed[:, :1], source.encoder.pos_embedding[:, :1])
    assert {'head.weight', 'cls_token', 'blocks.2.attn.qkv.weight'} <= from_torchvision(source.state_dict()).keys()


@pytest.mark.parametrize(('name', 'parts'), [
    ('swin_tiny_patch4_window7_224', {}),
    ('swinv2_tiny_window8_256', dict(block=swin_transformer.SwinTransformerBlockV2,
                                     downsample_layer=swin_transformer.PatchMergingV2))])
def test_torchvision_swin(name, parts):
    source = torchvision.models.SwinTransformer([2, 2], 8, [1, 2], [1, 2], [4, 4], num_classes=5, **parts).eval()
    for parameter in source.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)
    backbone = TimmBackbone(name, pool=True, **OTHERS['swin_tiny_patch4_window7_224']).eval()
    backbone.load(source.state_dict())
    x = images()
    torch.testing.assert_close(source.head(backbone(x)), source(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(('name', 'kwargs', 'error', 'message'), [
    ('vit_smal_patch16_224', {}, ValueError, "no model 'vit_smal_patch16_224'; did you mean 'vit_small_patch16_224'"),
    ('hf-hub:timm/vit', {}, ValueError, 'weights are given as a local file'), (3, {}, ValueError, 'the name of an'),
    ('resnet18', {}, ValueError, 'resnet18 .* is not built as embedded patches'),
    ('vit_tiny_patch16_224.nonsense', {}, ValueError, "no weights 'nonsense' of vit_tiny_patch16_224"),
    ('vit_tiny_patch16_224.augreg_in21', {}, ValueError, "did you mean 'augreg_in21k'"),
    ('vit_tiny_patch16_224', dict(pretrained=True), TypeError, 'no pretrained'),
    ('vit_tiny_patch16_224', dict(num_classes=3), TypeError, 'no num_classes'),
    ('vit_tiny_patch16_224', dict(depht=3), TypeError, 'depht')])
def test_wrong_names_and_keywords(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        TimmBackbone(name, **kwargs)


def test_no_images():
    backbone = make('vit_tiny_patch16_224')
    with pytest.raises(KeyError, match="need the key 'img'"):
        backbone(dict(points=images()))
    with pytest.raises(TypeError, match='img must be a tensor'):
        backbone([1])
    with pytest.raises(ValueError, match=r'\(B, C, H, W\)'):
        backbone(torch.zeros(3, 4))


# ---------------------------------------------------------------------------------------------------------------------
# Parameter groups
# ---------------------------------------------------------------------------------------------------------------------
def test_layers_of_a_swin_are_counted_through_its_stages():
    numbers = layer_numbers(make('swin_tiny_patch4_window7_224'))
    assert numbers['patch_embed.proj.weight'] == 0 and numbers['layers.0.blocks.0.mlp.fc1.weight'] == 1
    assert numbers['layers.1.downsample.norm.weight'] == 1 and numbers['layers.1.blocks.0.attn.qkv.weight'] == 2
    assert numbers['layers.1.blocks.1.norm2.bias'] == 3 and numbers['norm.weight'] == 4


def test_layer_decay():
    model = torch.nn.ModuleDict(dict(backbone=make('vit_tiny_patch16_224'), head=torch.nn.Linear(24, 5)))
    expand(model, [dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=2)])
    groups = param_groups(model, 1., 0.05, layer_decay=0.5, expert_lr_mult=3.)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: (group['lr'], group['weight_decay']) for group in groups for p in group['params']}
    assert len(rates) == len(names)
    assert rates['head.weight'] == (1., 0.05) and rates['backbone.norm.weight'] == (1., 0.)
    assert rates['backbone.blocks.2.mlp.fc1.weight'] == (0.5, 0.05)
    assert rates['backbone.blocks.1.mlp.fc1.weight'] == (0.75, 0.05) and rates['backbone.blocks.1.mlp.fc1.bias'][1] == 0
    assert rates['backbone.patch_embed.proj.weight'] == (0.0625, 0.05)
    assert rates['backbone.pos_embed'] == rates['backbone.cls_token'] == (0.0625, 0.)
    assert groups[0]['name'] == 'layer0.decay' and groups[-1]['name'] == 'layer4.no_decay'
    with pytest.raises(ValueError, match='layer_decay needs a learning rate'):
        param_groups(model, layer_decay=0.5)
    with pytest.raises(ValueError, match=r'layer_decay must lie in \(0, 1\]'):
        param_groups(model, 1., layer_decay=1.5)
    with pytest.raises(ValueError, match='no parameters called blocks'):
        param_groups(torch.nn.Linear(2, 2), 1., layer_decay=0.5)
