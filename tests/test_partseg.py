"""The part segmentation head: its definition, losses, restricted predictions, what is refused; whole models."""
import copy

import pytest
import torch
import torch.nn.functional as F
from test_propagation import build, inputs, model_cfg

import ewa3d
from ewa3d.fusing import example_inputs, output_difference
from ewa3d.models.build import fill_model
from ewa3d.models.partseg import PartSegHead, parts_mask
from ewa3d.models.propagation import PointFeatures
from ewa3d.structures import Sample

PARTS = dict(chair=[3, 0], lamp=[1, 2, 5], mug=[4, 6])


def features(B=3, N=8, C=5, D=4, category=None):
    shared = torch.randn(B, D, dtype=torch.float64).requires_grad_() if D else None
    return PointFeatures(torch.randn(B, N, C, dtype=torch.float64).requires_grad_(), shared, category)


def samples(B=3, N=8, parts=7):
    return [Sample(gt_parts=torch.randint(parts, (N,)), metainfo=dict(name=f'cloud {i}')) for i in range(B)]


@pytest.mark.parametrize('hidden', [(6, 10), (6,), (6, 5, 9)])
@pytest.mark.parametrize('shared', [4, 0])
@pytest.mark.parametrize('training', [True, False])
def test_definition_forward_and_backward(hidden, shared, training):
    head = PartSegHead(7, 5 + shared, hidden, dropout=0.).double().train(training)
    feats = features(D=shared)
    x = feats.x if not shared else torch.cat([feats.x, feats.shared.unsqueeze(1).expand(-1, 8, -1)], -1)
    rows = x.flatten(0, 1)
    for layer in head.layers:
        rows = layer(rows)
    expected = rows.log_softmax(-1).view(3, 8, 7)
    found = head(feats)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    leaves = [feats.x, *([feats.shared] if shared else []), *head.parameters()]
    for x, twin in zip(torch.autograd.grad(found, leaves, gradient), torch.autograd.grad(expected, leaves, gradient)):
        torch.testing.assert_close(x, twin)


def test_published_numbering():
    names = [type(layer).__name__ for layer in PartSegHead(50, 9).layers]
    assert names == ['Pointwise', 'BatchNorm1d', 'ReLU', 'Dropout', 'Pointwise', 'BatchNorm1d', 'ReLU', 'Pointwise']
    assert [type(layer).__name__ for layer in PartSegHead(50, 9, (128,)).layers] == [*names[:4], 'Pointwise']
    assert PartSegHead(50, 9).layers[4].out_features == 256


def test_loss():
    head, feats, given = PartSegHead(7, 9, (6,)).double().eval(), features(), samples()
    losses = head.loss(feats, given)
    labels = torch.stack([sample.gt_parts for sample in given])
    scores = head(feats)
    torch.testing.assert_close(losses['loss_seg'], F.nll_loss(scores.transpose(1, 2), labels))
    torch.testing.assert_close(losses['acc'], 100 * (scores.argmax(-1) == labels).float().mean())
    assert set(losses) == {'loss_seg', 'acc'} and not losses['acc'].requires_grad


@pytest.mark.parametrize('parts', [PARTS, list(PARTS.values())])
def test_predictions_are_parts_of_the_category(parts):
    category = torch.tensor([1, 0, 2])
    head = PartSegHead(in_channels=9, hidden=(6,), parts=parts).double().eval()
    assert head.num_parts == 7 and 'allowed' not in head.state_dict()
    feats, given = features(category=category), samples()
    found = head.predict(feats, given)
    assert found[0] is given[0]
    for sample, scores, label in zip(found, head(feats), category.tolist()):
        ids = list(PARTS.values())[label]
        torch.testing.assert_close(sample.part_scores, scores)
        assert sample.pred_parts.tolist() == [max(ids, key=lambda part, row=row: row[part].item()) for row in scores]
    free = head.predict(feats._replace(category=None))
    assert torch.equal(torch.stack([sample.pred_parts for sample in free]), head(feats).argmax(-1))
    free = PartSegHead(7, 9, (6,)).double().eval()
    assert torch.equal(free.predict(feats)[1].pred_parts, free(feats)[1].argmax(-1))


def test_parts_mask():
    assert parts_mask([[2, 0], [1]], 4).tolist() == [[True, False, True, False], [False, True, False, False]]
    for parts in ([[0], []], [[0, 4]], [[-1]]):
        with pytest.raises(ValueError, match='must be some of 0 … 3'):
            parts_mask(parts, 4)


@pytest.mark.parametrize('change, error, message', [
    (dict(num_parts=None), ValueError, 'num_parts is not set.*tools/train.py'),
    (dict(in_channels=None), ValueError, 'in_channels is not set'), (dict(num_parts=0), ValueError, 'at least 1'),
    (dict(hidden=()), ValueError, 'must be the widths'), (dict(hidden=8), ValueError, 'must be the widths'),
    (dict(hidden=(8, 0)), ValueError, 'each of hidden must be at least 1'),
    (dict(dropout=2), ValueError, r'dropout must lie in \[0, 1\]'), (dict(parts=[[9]]), ValueError, '0 … 6')])
def test_settings_that_cannot_be(change, error, message):
    with pytest.raises(error, match=message):
        PartSegHead(**{**dict(num_parts=7, in_channels=9), **change})


def test_labels_that_cannot_be():
    head, feats = PartSegHead(7, 9, (6,)).double(), features()
    for bad, message in ((None, r"'cloud 1': gt_parts must be one part a point, \(8,\), got none"),
                         (torch.zeros(9).long(), r"'cloud 1': .* got the shape \(9,\)"),
                         (torch.arange(8), r"'cloud 1' has the part labels 0 to 7; the head has 7 parts, 0 to 6"),
                         (torch.arange(8) - 2, "'cloud 1' has the part labels -2 to 5")):
        given = samples()
        given[1] = Sample(metainfo=dict(name='cloud 1'), **({} if bad is None else dict(gt_parts=bad)))
        with pytest.raises(ValueError, match=message):
            head.loss(feats, given)
    with pytest.raises(ValueError, match='features of 9 channels expected, got 5'):
        head(feats._replace(shared=None))


# ---- whole models ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('form', ['mae', 'bert'])
def test_modes(form):
    model, data = build(form), inputs()
    given = samples(N=20)
    losses = model(data, given, mode='loss')
    losses['loss_seg'].backward()
    model.eval()
    found = model(data, given, mode='predict')
    assert found[2] is given[2] and torch.equal(found[1].part_scores, model(data)[1].detach())
    with pytest.raises(ValueError, match='needs data_samples'):
        model(data, mode='loss')


def test_a_batch_through_the_preprocessor():
    model, data = build('mae'), inputs()
    batch = dict(inputs={key: list(value) for key, value in data.items()}, data_samples=samples(N=20))
    stacked = model.data_preprocessor(batch)
    assert stacked['inputs']['category'].tolist() == [0, 1, 2]
    assert torch.equal(stacked['inputs']['points'], data['points'])
    assert model(**stacked, mode='loss')['loss_seg'] > 0


def test_what_a_model_takes_from_the_data():
    cfg = model_cfg('mae', categories=None)
    cfg['head'].pop('num_parts')
    metainfo = dict(classes=list(PARTS), parts=PARTS)
    with pytest.raises(ValueError, match='num_categories is not set'):
        ewa3d.build(cfg)
    filled = copy.deepcopy(cfg)
    fill_model(filled, metainfo, 'training')
    model = ewa3d.build(filled)
    assert model.neck.num_categories == 3 and model.head.num_parts == 7
    untold = copy.deepcopy(cfg)
    untold['neck']['num_categories'] = 0
    fill_model(untold, metainfo, 'training')
    assert ewa3d.build(untold).neck.num_categories == 0
    cfg['neck']['num_categories'] = 2
    with pytest.raises(ValueError, match=r'model\.neck\.num_categories is 2, but the training data have 3 classes'):
        fill_model(cfg, metainfo, 'training')


def test_build_with_a_checkpoint_takes_them_from_there(tmp_path):
    cfg, path = model_cfg('bert', categories=None), tmp_path / 'x.pth'
    cfg['head'].pop('num_parts')
    model = build('bert').eval()
    meta = dict(dataset_meta=dict(classes=list(PARTS), parts=PARTS))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    data = inputs()
    assert torch.equal(ewa3d.build(cfg, path)(data), model(data))


def test_expanded_and_fused_models_are_compared_with_categories():
    model = build('mae')
    ewa3d.expand(model, [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)])
    plain = copy.deepcopy(model)
    ewa3d.fuse(plain)
    example = example_inputs(dict(model=model_cfg('mae')))
    assert example['category'].tolist() == [0, 1] and example['points'].shape == (2, 1024, 3)
    for dtype in (torch.float32, torch.float64):
        assert output_difference(model, plain, example, dtype)['relative'] < 1e-5
    assert 'category' not in example_inputs(dict(model=model_cfg('mae', categories=0)))


def test_a_classifiers_checkpoint_gives_its_backbone(tmp_path):
    cfg = model_cfg('mae')
    classifier = ewa3d.build(dict(cfg, neck=dict(type='TokenPool'), head=dict(type='ClsHead', num_classes=4)))
    torch.save(dict(state_dict=classifier.state_dict()), tmp_path / 'x.pth')
    model = ewa3d.build(dict(cfg, pretrained=str(tmp_path / 'x.pth')))
    report, own = model.load_report, model.state_dict()
    assert not {key for key in report.missing if key.startswith('backbone.')}
    for key, value in classifier.state_dict().items():
        if key.startswith('backbone.'):
            assert torch.equal(own[key], value)


def test_classification_needs_no_category():
    cfg = dict(model_cfg('mae'), neck=dict(type='TokenPool'), head=dict(type='ClsHead', num_classes=4))
    model = ewa3d.build(cfg).eval()
    points = torch.randn(2, 20, 3)
    assert torch.equal(model(points), model(dict(points=points)))
    assert torch.equal(model(points), model.head(model.neck(model.backbone(dict(points=points)))))
