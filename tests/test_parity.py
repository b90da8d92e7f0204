"""The same weights and inputs give the numbers of the published implementations."""
import pytest
import torch

import ewa3d
from ewa3d.models.weights import load_plain, rename
from ewa3d.structures import Sample

TOLERANCE = dict(atol=3e-5, rtol=3e-5)


def config(meta: dict, **head) -> dict:
    c = {**meta['config'], **meta['config'].get('transformer_config', {})}
    dim, encoder_dim = c['trans_dim'], c['encoder_dims']
    tokenizer = dict(type='PointPatchEmbed', num_groups=c['num_group'], group_size=c['group_size'], skip_origin=True,
                     encoder_dim=encoder_dim if encoder_dim != dim else None)
    return dict(type='TaskModel', neck=dict(type='TokenPool', mode='cls+max'), head=dict(type='ClsHead', **head),
                backbone=dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=dim, depth=c['depth'],
                              num_heads=c['num_heads'], drop_path_rate=c['drop_path_rate']))


def sorted_rows(patches):
    """Points of each patch by (x, y, z): their order has no meaning."""
    flat = patches.detach().flatten(0, 1)
    return torch.stack([torch.tensor(sorted(patch.tolist())) for patch in flat]).view_as(patches)


CLASSIFIERS = [('pointmae_cls', dict(form='mlp')), ('pointbert_cls', dict(form='mlp_nobn'))]


@pytest.fixture(params=CLASSIFIERS, ids=lambda p: p[0])
def classifier(request, reference):
    name, head = request.param
    ref = reference(name)
    cfg = config(ref.meta, num_classes=ref.meta['config']['cls_dim'], **head)
    return ref, ewa3d.build(cfg, ref.path / 'checkpoint.pth')


def test_every_stage(classifier):
    ref, model = classifier
    expected, backbone = ref.expected, model.backbone
    tokens = backbone.tokenize(dict(points=ref.inputs['points']))
    torch.testing.assert_close(tokens.coord, expected['center'], atol=1e-6, rtol=0)
    torch.testing.assert_close(sorted_rows(tokens.target), expected['neighborhood'], atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens.pos, expected['pos_embed'], **TOLERANCE)
    torch.testing.assert_close(tokens.x, expected['patch_tokens'], **TOLERANCE)
    if 'patch_features' in expected:
        features = backbone.tokenizer.encoder(tokens.target.flatten(0, 1))
        torch.testing.assert_close(features, expected['patch_features'].flatten(0, 1), **TOLERANCE)
    depth = len(backbone.blocks)
    blocks = backbone.encode(tokens.x, tokens.pos, out_indices=range(depth), norm=False)
    for i, x in enumerate(blocks):
        torch.testing.assert_close(x, expected[f'block_{i}'], **TOLERANCE)
    torch.testing.assert_close(backbone.encode(tokens.x, tokens.pos), expected['norm'], **TOLERANCE)


def test_output_loss_and_gradients(classifier):
    ref, model = classifier
    points, expected = ref.inputs['points'], ref.expected
    torch.testing.assert_close(model.extract(points), expected['feature'], **TOLERANCE)
    torch.testing.assert_close(model(dict(points=points)), expected['logits'], **TOLERANCE)
    samples = [Sample(gt_label=label) for label in ref.inputs['label']]
    losses = model(points, samples, mode='loss')
    torch.testing.assert_close(losses['loss_cls'].detach(), expected['loss_ce'], **TOLERANCE)
    torch.testing.assert_close(losses['acc'], expected['acc_percent'].view(()))
    if 'loss_smooth' in expected:  # Point-BERT spreads its 0.2 over the wrong classes, torch over all
        classes = model.head.num_classes
        model.head.label_smoothing = 0.2 * classes / (classes - 1)
        losses = model(points, samples, mode='loss')
        torch.testing.assert_close(losses['loss_cls'].detach(), expected['loss_smooth'], **TOLERANCE)
    losses['loss_cls'].backward()
    grads = rename({name: p.grad for name, p in model.named_parameters()}, 'point_mae', reverse=True)
    stored = {key.removeprefix('grad/'): value for key, value in expected.items() if key.startswith('grad/')}
    assert stored
    for name, value in stored.items():
        torch.testing.assert_close(grads[name], value, **TOLERANCE)


def test_expanding_keeps_the_published_numbers(reference):
    ref = reference('pointmae_cls')
    model = ewa3d.build(config(ref.meta, num_classes=10), ref.path / 'checkpoint.pth')
    rules = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=3)]
    ewa3d.expand(model, rules)
    torch.testing.assert_close(model(ref.inputs['points']), ref.expected['logits'], **TOLERANCE)
    ewa3d.fuse(model)
    torch.testing.assert_close(model(ref.inputs['points']), ref.expected['logits'], **TOLERANCE)


def test_pretrained_encoder_goes_into_a_classifier(reference):
    ref = reference('pointmae_pretrain')
    path = ref.path / 'checkpoint.pth'
    model = ewa3d.build(dict(config(ref.meta, num_classes=6), pretrained=str(path)))
    report = model.load_report
    assert report.layout == 'point_mae_pretrain' and not report.unexpected
    assert {key for key in report.missing if key.startswith('backbone.')} == {'backbone.cls_token', 'backbone.cls_pos'}
    state = torch.load(path, weights_only=True)['base_model']
    own = model.state_dict()
    theirs = 'MAE_encoder.encoder.first_conv.0.weight'
    assert torch.equal(own['backbone.tokenizer.encoder.first_conv.0.weight'], state[theirs].squeeze(-1))
    assert torch.equal(own['backbone.blocks.1.attn.qkv.weight'], state['MAE_encoder.blocks.blocks.1.attn.qkv.weight'])


def test_other_number_of_classes(reference):
    ref = reference('pointmae_cls')
    with pytest.raises(ValueError, match=r'\(10,\).*\(15,\).*skip_head'):
        ewa3d.build(config(ref.meta, num_classes=15), ref.path / 'checkpoint.pth')
    model = ewa3d.build(config(ref.meta, num_classes=15))
    report = load_plain(model, ref.path / 'checkpoint.pth', skip_head=True)
    assert not report.missing and not report.unexpected and report.skipped


def test_point_bert_weights_are_no_point_mae_model(reference):
    bert, mae = reference('pointbert_cls'), reference('pointmae_cls')
    with pytest.raises(ValueError, match='pointbert_cls'):
        ewa3d.build(config(mae.meta, num_classes=10), bert.path / 'checkpoint.pth')
