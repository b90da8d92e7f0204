"""ImagePatchEmbed, a small ViT of our own, and blocks that go between images and clouds."""
import pytest
import timm
import torch
from engine_toys import on_cpu, same  # noqa: F401
from test_resume import assert_same_run, train

from ewa3d import build, expand
from ewa3d.engine.checkpoint import write_checkpoint
from ewa3d.fusing import example_inputs, fuse_checkpoint, image_shape
from ewa3d.layers.image_tokens import ImagePatchEmbed
from ewa3d.models.weights import load_plain
from ewa3d.registry import MODELS

SIZES = dict(embed_dim=24, depth=3, num_heads=2, qkv_bias=True, norm_eps=1e-6)


def vit(**backbone) -> dict:
    tokenizer = dict(type='ImagePatchEmbed', img_size=16, patch_size=4)
    backbone = dict(type='TokenEncoder', tokenizer=tokenizer, pos='first', **SIZES, **backbone)
    return dict(type='TaskModel', backbone=backbone,
                neck=dict(type='TokenPool', mode='cls'), head=dict(type='ClsHead', form='linear', num_classes=5))


def cloud_model(**changes) -> dict:
    tokenizer = dict(type='PointPatchEmbed', num_groups=6, group_size=6, widths=(8, 8, 16), pos_dim=8)
    return dict(type='TaskModel', backbone=dict(type='TokenEncoder', tokenizer=tokenizer, **SIZES),
                neck=dict(type='TokenPool'), head=dict(type='ClsHead', form='linear', num_classes=3), **changes)


@pytest.mark.parametrize(('img', 'patch', 'channels'), [(8, 4, 3), ((6, 8), (3, 2), 1)])
def test_tokens(img, patch, channels):
    embed = ImagePatchEmbed(img, patch, channels, embed_dim=12)
    (H, W), (P, Q) = embed.img_size, embed.patch_size
    x = torch.randn(2, channels, H, W)
    tokens = embed(dict(img=x))
    number = 0
    for row in range(H // P):
        for column in range(W // Q):
            cut = x[:, :, row * P:(row + 1) * P, column * Q:(column + 1) * Q].flatten(1)
            expected = cut @ embed.proj.weight.flatten(1).T + embed.proj.bias
            torch.testing.assert_close(tokens.x[:, number], expected, atol=1e-5, rtol=1e-5)
            middle = torch.tensor([(row + 0.5) * P / H, (column + 0.5) * Q / W]) * 2 - 1
            torch.testing.assert_close(tokens.coord[0, number], middle)
            number += 1
    assert tokens.x.shape == tokens.pos.shape == (2, number, 12) and tokens.target is None


@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(img_size=9), ValueError, 'no multiple of patch_size'), (dict(patch_size=0), ValueError, 'patch_size'),
    (dict(img_size=(8, 8, 8)), ValueError, r'\(height, width\)'), (dict(in_channels=0), ValueError, 'in_channels'),
    (dict(img_size='8'), TypeError, 'img_size')])
def test_wrong_settings(options, error, message):
    with pytest.raises(error, match=message):
        ImagePatchEmbed(**{**dict(img_size=8, patch_size=4, embed_dim=8), **options})


def test_wrong_images():
    embed = ImagePatchEmbed(8, 4, 3, 8)
    with pytest.raises(ValueError, match=r'images \(B, 3, 8, 8\) expected, got \(2, 3, 8, 9\)'):
        embed(torch.zeros(2, 3, 8, 9))
    with pytest.raises(KeyError, match="need the key 'img', found"):
        embed(dict(points=torch.zeros(2, 3, 8, 8)))


def test_is_a_vit():
    """The same function as timm's, on timm's weights."""
    plain = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2,
                                          num_classes=5).eval()
    model = MODELS.build(vit()).eval()
    own, state = model.state_dict(), plain.state_dict()
    position = state.pop('pos_embed')
    renamed = {'backbone.cls_pos': position[:, :1], 'backbone.tokenizer.pos_embed': position[:, 1:],
               'backbone.cls_token': state.pop('cls_token')}
    for key, value in state.items():
        key = key.replace('patch_embed.', 'tokenizer.')
        renamed[key.replace('head.', 'head.layers.0.') if key.startswith('head.') else f'backbone.{key}'] = value
    model.load_state_dict(renamed, strict=True)
    assert renamed.keys() == own.keys()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(dict(img=x)), plain(x), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# From images to clouds and back
# ---------------------------------------------------------------------------------------------------------------------
BLOCKS = ['backbone.blocks', 'backbone.norm']


def test_blocks_of_a_vit_start_a_point_transformer(tmp_path):
    source = MODELS.build(vit())
    torch.nn.init.normal_(source.backbone.norm.weight)
    file = write_checkpoint(tmp_path / 'vit.pth', source.state_dict())
    target = MODELS.build(cloud_model(pretrained=dict(source=str(file), parts=BLOCKS)))
    for key, value in target.state_dict().items():
        if key.startswith(tuple(BLOCKS)):
            assert torch.equal(value, source.state_dict()[key]), key
    report = target.load_report
    assert all(key.startswith(tuple(BLOCKS)) for key in report.matched) and 'backbone.cls_token' in report.missing
    assert 'backbone.tokenizer.proj.weight' in report.skipped and 'head.layers.0.weight' in report.skipped
    assert 'tensors loaded' in str(report)
    back = MODELS.build(vit())
    load_plain(back, target.state_dict(), parts=BLOCKS)
    assert same(back.backbone.blocks.state_dict(), source.backbone.blocks.state_dict())


def test_plain_blocks_start_experts_and_experts_go_on(tmp_path):
    rules = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=2, num_experts=2)]
    source = MODELS.build(vit())
    file = write_checkpoint(tmp_path / 'plain.pth', source.state_dict())
    target = MODELS.build(cloud_model(pretrained=dict(source=str(file), parts=BLOCKS), expand=rules))
    stacked = target.backbone.blocks[1].mlp.fc1.weight
    assert all(torch.equal(expert, source.backbone.blocks[1].mlp.fc1.weight) for expert in stacked)
    expand(source, rules)
    torch.nn.init.normal_(source.backbone.blocks[1].mlp.fc1.weight)
    file = write_checkpoint(tmp_path / 'experts.pth', source.state_dict())
    target = MODELS.build(cloud_model(pretrained=dict(source=str(file), parts=BLOCKS), expand=rules))
    assert torch.equal(target.backbone.blocks[1].mlp.fc1.weight, source.backbone.blocks[1].mlp.fc1.weight)
    with pytest.raises(ValueError, match='is of an expanded model, and this one is plain'):
        MODELS.build(cloud_model(pretrained=dict(source=str(file), parts=BLOCKS)))


def test_timm_weights_start_a_point_transformer():
    plain = timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2)
    target = MODELS.build(cloud_model())
    report = load_plain(target, plain.state_dict(), parts=BLOCKS)
    assert report.layout == 'timm'
    assert torch.equal(target.backbone.blocks[2].mlp.fc2.weight, plain.blocks[2].mlp.fc2.weight)
    backbone = dict(type='TimmBackbone', name='vit_tiny_patch16_224', pool=True, img_size=16, patch_size=4,
                    embed_dim=24, depth=3, num_heads=2)
    model = MODELS.build(dict(type='TaskModel', backbone=backbone, head=dict(type='ClsHead', form='linear',
                                                                             num_classes=1000)))
    assert not load_plain(model, plain.state_dict()).missing
    assert torch.equal(model.head.layers[0].weight, plain.head.weight)
    load_plain(model, target.state_dict(), parts=['backbone.blocks'])
    with pytest.raises(ValueError, match=r'does not fit backbone\.blocks'):
        load_plain(MODELS.build(dict(vit(), backbone=dict(vit()['backbone'], depth=4))), plain.state_dict(),
                   parts=['backbone.blocks'])


def test_what_a_part_has_no_place_for():
    without_bias = cloud_model()
    without_bias['backbone']['qkv_bias'] = False
    source, target = MODELS.build(vit()), MODELS.build(without_bias)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=r'blocks\.0\.attn\.qkv\.bias.*would compute something else; qkv_bias=True'):
        load_plain(target, source.state_dict(), parts=BLOCKS)
    assert same(target.state_dict(), before)
    report = load_plain(target, source.state_dict(), parts=BLOCKS, strict=False)
    assert report.unexpected == [f'backbone.blocks.{i}.attn.qkv.bias' for i in range(3)]
    assert torch.equal(target.backbone.blocks[2].attn.qkv.weight, source.backbone.blocks[2].attn.qkv.weight)


def test_wrong_parts():
    model, state = MODELS.build(cloud_model()), MODELS.build(vit()).state_dict()
    with pytest.raises(ValueError, match=r"no part 'backbone.blcks'; did you mean"):
        load_plain(model, state, parts=['backbone.blcks'])
    with pytest.raises(TypeError, match='parts is a list'):
        load_plain(model, state, parts='backbone.blocks')
    with pytest.raises(ValueError, match=r'missing: backbone\.tokenizer\.encoder'):
        load_plain(model, state, parts=['backbone.tokenizer'])


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
def digits_config(work_dir, epochs: int = 2) -> dict:
    steps = [dict(type='ImageTransforms', transforms=[dict(name='RandomAffine', degrees=10)]), dict(type='PackImage')]
    loader = dict(batch_size=8, num_workers=0)
    model = vit()
    model['backbone'].update(tokenizer=dict(type='ImagePatchEmbed', img_size=8, patch_size=4, in_channels=1), depth=2)
    model.update(expand=[dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)],
                 data_preprocessor=dict(type='ImagePreprocessor', mixup=0.8, cutmix=1.))
    model['head'].pop('num_classes')
    return dict(
        default_scope='ewa3d', work_dir=str(work_dir), model=model,
        train_dataloader=dict(**loader, drop_last=True, sampler=dict(type='DefaultSampler', shuffle=True),
                              dataset=dict(type='Digits', indices=32, pipeline=steps)),
        val_dataloader=dict(**loader, sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
                            dataset=dict(type='Digits', split='test', indices=9, pipeline=steps[1:])),
        val_evaluator=dict(type='Accuracy'), val_cfg=dict(), train_cfg=dict(max_epochs=epochs),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3), constructor='ParamGroups',
                           paramwise_cfg=dict(layer_decay=0.7)),
        default_hooks=dict(ewa=dict(type='EWAHook')))


def test_a_run_with_mixing_resumes_bit_for_bit_and_fuses(tmp_path):
    train(digits_config(tmp_path / 'whole'))
    cfg = digits_config(tmp_path / 'parts')
    train(cfg, stop_after=1)
    train({**cfg, 'resume': True})
    assert_same_run(tmp_path / 'whole', tmp_path / 'parts', 2)
    report = fuse_checkpoint(tmp_path / 'whole' / 'epoch_2.pth', tmp_path / 'fused.pth')
    assert report.written and report.fused == 2
    plain = digits_config(tmp_path)['model']
    plain.pop('expand')
    model = build(plain, tmp_path / 'fused.pth')
    assert model(dict(img=torch.randn(2, 1, 8, 8))).shape == (2, 10)


def test_shapes_of_example_inputs():
    tokenizers = dict(points=dict(type='PointPatchEmbed'), img=dict(type='ImagePatchEmbed', img_size=32))
    both = example_inputs(dict(model=dict(backbone=dict(type='TokenEncoder', tokenizer=tokenizers))))
    assert both['img'].shape == (2, 3, 32, 32) and both['points'].shape == (2, 1024, 3)
    assert image_shape(dict(type='TimmBackbone', name='vit_small_patch16_384')) == (3, 384, 384)
    assert image_shape(dict(type='TimmBackbone', name='vit_small_patch16_224', img_size=64, in_chans=1)) == (1, 64, 64)
    assert image_shape(dict(type='TokenEncoder', tokenizer=dict(type='ImagePatchEmbed', img_size=(8, 4)))) == (3, 8, 4)
    assert image_shape(dict(type='TokenEncoder', tokenizer=dict(type='PointPatchEmbed'))) is None
    assert set(example_inputs(dict(model=dict(backbone=dict(type='TokenEncoder'))))) == {'points'}
