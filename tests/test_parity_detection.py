"""3DETR: the same weights and inputs give the numbers of the published network, at every stage."""
import argparse

import pytest
import torch
from official_detr import checkpoint, predictions

import ewa3d
from ewa3d.convert import convert_checkpoint
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.models.weights import rename
from ewa3d.ops import box3d_corners
from ewa3d.structures import Sample

TOLERANCE = dict(atol=3e-5, rtol=3e-5)
FIXTURES = ['threedetr_scannet', 'threedetr_m_sunrgbd']
PREDICTED = dict(sem_cls_logits='sem_cls_logits', center='center_unnormalized', center_normalized='center_normalized',
                 size='size_unnormalized', size_normalized='size_normalized', angle_logits='angle_logits',
                 angle_residual_normalized='angle_residual_normalized', angle='angle_continuous')


def close(found, expected, name=''):
    torch.testing.assert_close(found, expected, **TOLERANCE, msg=lambda text: f'{name}: {text}')


@pytest.fixture(params=FIXTURES)
def published(request, reference):
    """A fixture, its model, its clouds and its samples."""
    ref = reference(request.param)
    model = ewa3d.from_official('3detr', ref.path / 'checkpoint.pth')
    inputs, samples = ref.inputs, []
    for b, present in enumerate(inputs['gt_box_present'].bool()):
        columns = (inputs['gt_box_centers'], inputs['gt_box_sizes'], -inputs['gt_box_angles'].unsqueeze(-1))
        samples.append(Sample(gt_boxes=torch.cat([c[b] for c in columns], -1)[present],
                              gt_labels=inputs['gt_box_sem_cls_label'][b][present]))
    return ref, model, inputs['point_clouds'], samples


@torch.no_grad()
def test_every_stage(published):
    ref, model, points, _ = published
    expected, stages = ref.expected, {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: stages.update({name: output}))
    feats = model.extract(points)
    close(stages['backbone.tokenizer'].coord, expected['pre_encoder/xyz'])
    close(stages['backbone.tokenizer'].x, expected['pre_encoder/features'], 'tokens')
    if 'interim/xyz' in expected:
        close(stages['backbone.downsample'].coord, expected['interim/xyz'])
        close(stages['backbone.downsample'].x, expected['interim/features'], 'interim')
    for i, _ in enumerate(model.backbone.blocks):
        close(stages[f'backbone.blocks.{i}'], expected[f'encoder_layer_{i}'], f'encoder {i}')
    close(stages['neck.project'].view(expected['encoder_features'].shape), expected['encoder_features'], 'memory')
    close(feats.coord, expected['query_xyz'])
    close(stages['neck.query_embed'].view(expected['query_embedding'].shape), expected['query_embedding'])
    close(model.neck.pos_embed(feats.coord, feats.low, feats.high), expected['query_fourier'])
    close(model.neck.pos_embed(expected['encoder_xyz'], feats.low, feats.high), expected['encoder_fourier'])
    for i, _ in enumerate(model.neck.blocks):
        close(stages[f'neck.blocks.{i}'], expected[f'decoder_layer_{i}'], f'decoder {i}')
    close(feats.x, expected['box_features'], 'queries')


@torch.no_grad()
def test_predictions(published):
    ref, model, points, samples = published
    raw, predicted = model(points), model.head.predictions(model.extract(points))
    for ours, theirs in PREDICTED.items():
        expected = ref.expected[f'pred/{theirs}']
        close(predicted[ours], expected, theirs)
        for found, layer in zip((*raw['aux'], raw), expected):
            close(found[ours], layer, theirs)
    x, y, z = box3d_corners(model.head.coder.boxes(predicted)).unbind(-1)
    close(torch.stack([x, -z, y], -1), ref.expected['pred/box_corners'], 'corners')
    for i, sample in enumerate(model(points, samples, mode='predict')):
        close(sample.pred_objectness, ref.expected['pred/objectness_prob'][-1, i])
        close(sample.pred_scores, ref.expected['pred/sem_cls_prob'][-1, i])
        close(-sample.pred_boxes[:, 6], raw['angle'][i])
        close(sample.pred_boxes[:, :6], torch.cat([raw['center'][i], raw['size'][i]], -1))


def test_matching(published):
    ref, model, points, samples = published
    feats = model.extract(points)
    D, B, Q, _ = feats.x.shape
    targets = model.head.targets(samples, Q, feats.coord)
    clouds, queries, objects = model.head.match(model.head.predictions(feats), *targets, feats)
    found, matched = torch.zeros(D * B, Q, dtype=torch.int64), torch.zeros(D * B, Q)
    found[clouds, queries], matched[clouds, queries] = objects, 1
    assert torch.equal(found.view(D, B, Q), ref.expected['match/per_prop_gt_inds'])
    assert torch.equal(matched.view(D, B, Q), ref.expected['match/proposal_matched_mask'])


def test_losses_and_gradients(published):
    ref, model, points, samples = published
    losses = model(points, samples, mode='loss')
    close(losses.pop('cardinality_error'), ref.expected['loss/loss_cardinality'])
    close(model.parse_losses(losses)[0].detach(), ref.expected['loss/total'])
    for name, value in losses.items():
        close(value.detach(), ref.expected[f'loss/{name}'], name)
    skipped = {'loss/total', 'loss/loss_cardinality', 'loss/loss_cardinality_0'}
    assert {f'loss/{name}' for name in losses} == {name for name in ref.expected if 'loss/' in name} - skipped
    sum(losses.values()).backward()
    gradients = rename({name: p.grad for name, p in model.named_parameters()}, '3detr', reverse=True)
    names = [name for name in ref.expected if name.startswith('grad/')]
    assert names
    for name in names:
        close(gradients[name.removeprefix('grad/')], ref.expected[name], name)


@torch.no_grad()
def test_expanding_and_fusing_keep_the_numbers(published):
    ref, model, points, _ = published
    report = ewa3d.expand(model, [dict(type='EWAFFN', at=at, num_experts=2) for at in
                                  ('backbone.blocks.*.mlp', 'neck.blocks.*.mlp')])
    assert len(report) == 5
    close(model(points)['sem_cls_logits'], ref.expected['pred/sem_cls_logits'][-1], 'expanded')
    ewa3d.fuse(model)
    close(model(points)['sem_cls_logits'], ref.expected['pred/sem_cls_logits'][-1], 'fused')


@pytest.mark.parametrize('name', FIXTURES)
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_there_and_back_is_the_same_bit_for_bit(reference, tmp_path, name, suffix):
    source, ours, back = reference(name).path / 'checkpoint.pth', tmp_path / f'x.{suffix}', tmp_path / 'back.pth'
    report = convert_checkpoint('3detr', source, ours)
    assert report.written and not report.missing and not report.unexpected and '3detr detection' in str(report)
    report = convert_checkpoint('3detr', ours, back, to_official=True)
    assert report.written and not report.missing and not report.unexpected
    original, again = read_checkpoint(source), read_checkpoint(back)
    assert original['model'].keys() == again['model'].keys()
    for key, value in original['model'].items():
        assert value.dtype == again['model'][key].dtype and torch.equal(value, again['model'][key]), key
    assert again['args'] == original['args']
    points = torch.rand(1, 700, 3)
    first, second = (ewa3d.from_official('3detr', path)(points)['center'] for path in (source, back))
    assert torch.equal(first, second)


# ---- other sizes ----------------------------------------------------------------------------------------------------
SIZES = [dict(), dict(color=True, enc=32, dec=16, bins=7, dec_layers=3, classes=2), dict(masked=True, bins=12),
         dict(masked=True, color=True, enc=20, enc_heads=5, dec=24, dec_heads=3, npoints=33, queries=16, enc_ffn=50),
         dict(enc_layers=1, dec_layers=1, enc=16, dec=16, enc_heads=1, dec_heads=8, npoints=50, queries=50, bins=2),
         dict(enc_layers=5, enc_ffn=7, dec_ffn=61, enc_activation='gelu', queries=1)]


@pytest.mark.parametrize('sizes', SIZES, ids=str)
@torch.no_grad()
def test_other_sizes(tmp_path, sizes):
    content = checkpoint(**sizes)
    torch.save(content, tmp_path / 'ckpt.pth')
    model = ewa3d.from_official('3detr', tmp_path / 'ckpt.pth')
    points = torch.rand(2, 130, 6 if sizes.get('color') else 3) * torch.tensor([2.1, 1.3, 0.9, 1., 1., 1.])[
        :6 if sizes.get('color') else 3]
    activation = torch.nn.functional.gelu if sizes.get('enc_activation') else torch.relu
    expected = predictions(content, points, activation)
    found = model(dict(points=points))
    assert len(found['aux']) == len(expected) - 1
    for layer, (ours, theirs) in enumerate(zip((*found['aux'], found), expected)):
        for name, value in theirs.items():
            close(ours[name], value, f'{name} of layer {layer}')


def test_stored_arguments_say_what_weights_do_not(tmp_path):
    path = tmp_path / 'ckpt.pth'
    torch.save(checkpoint(enc_dropout=0.3, dec_dropout=0.2, mlp_dropout=0.4, matcher_giou_cost=3,
                          matcher_objectness_cost=5, loss_giou_weight=0, loss_no_object_weight=0.1), path)
    model = ewa3d.from_official('3detr', path)
    assert model.backbone.blocks[0].attn.attn_drop.p == model.backbone.blocks[0].mlp.drop1.p == 0.3
    assert model.neck.blocks[0].cross.attn_drop.p == 0.2 and model.head.center_head[3].p == 0.4
    assert model.head.costs == dict(giou=3, sem_cls=1, center=0, objectness=5) and model.head.giou == 'official'
    assert model.head.loss_weights['giou'] == 0 and model.head.loss_weights['no_object'] == 0.1
    other = ewa3d.from_official('3detr', path, nqueries=4, enc_nhead=2, giou='exact', preenc_npoints=20)
    assert other.neck.num_queries == 4 and other.backbone.blocks[0].attn.num_heads == 2
    assert other.backbone.tokenizer.num_points == 20 and other.head.giou == 'exact'


def test_files_without_arguments_have_the_official_defaults(tmp_path):
    content = checkpoint(masked=True)
    torch.save(dict(model={f'module.{key}': value for key, value in content['model'].items()}), tmp_path / 'a.pth')
    model = ewa3d.from_official('3detr', tmp_path / 'a.pth')
    assert (model.backbone.tokenizer.num_points, model.backbone.downsample.num_points) == (2048, 1024)
    assert model.neck.num_queries == 256 and model.backbone.radii == pytest.approx((0.16, 0.64, 1.44))
    plain = ewa3d.from_official('3detr', tmp_path / 'a.pth', mask_radius_compat=False, num_heads=2)
    assert plain.backbone.radii == (0.4, 0.8, 1.2)


def test_what_does_not_fit_is_said(tmp_path):
    path = tmp_path / 'ckpt.pth'
    torch.save(checkpoint(), path)
    with pytest.raises(ValueError, match=r'ckpt\.pth: num_heads=5 does not divide the width of the weights, 24'):
        ewa3d.from_official('3detr', path, num_heads=5)
    with pytest.raises(ValueError, match=r'decoder_num_heads=3 does not divide the width of the weights, 32'):
        ewa3d.from_official('3detr', path, dec_nhead=3)
    with pytest.raises(ValueError, match='depth=8 was given, and the weights have depth=3'):
        ewa3d.from_official('3detr', path, enc_nlayers=8)
    with pytest.raises(TypeError, match="no size 'num_querys'; did you mean 'num_queries'"):
        ewa3d.from_official('3detr', path, num_querys=8)
    with pytest.raises(ValueError, match='3detr detection weights, not the official weights of point-mae'):
        ewa3d.from_official('point-mae', path)
    torch.save({**checkpoint(), 'args': argparse.Namespace(pos_embed='sine')}, path)
    with pytest.raises(ValueError, match="pos_embed='sine'; only 'fourier' is supported"):
        ewa3d.from_official('3detr', path)
    content = checkpoint()
    del content['model']['mlp_heads.center_head.layers.8.bias']
    torch.save(content, path)
    with pytest.raises(ValueError, match=r'ckpt\.pth does not fit the model: .* head\.center_head\.8\.bias'):
        ewa3d.from_official('3detr', path)
