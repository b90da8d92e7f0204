"""Necks from tokens to points: against naive forms forward and backward, with and without categories and normals."""
import pytest
import torch
import torch.nn.functional as F
from official_partseg import log_probs

import ewa3d
from ewa3d.layers.dgcnn import EdgeConv
from ewa3d.models.propagation import FeaturePropagation, GraphPropagation, PointFeaturePropagation
from ewa3d.models.weights import rename
from ewa3d.ops import neighbours

TOKENIZER = dict(type='PointPatchEmbed', num_groups=6, group_size=4, widths=(8, 12, 16), pos_dim=8)
NECKS = {'mae': dict(type='PointFeaturePropagation', out_dim=10, out_indices=(0, 1, 2)),
         'bert': dict(type='GraphPropagation', fps_levels=(12, 8), graph_dim=16, out_indices=(0, 1, 2))}


def model_cfg(form='mae', features=0, categories=3, **neck):
    return dict(type='TaskModel', neck={**NECKS[form], 'num_categories': categories, **neck},
                backbone=dict(type='TokenEncoder', tokenizer=dict(TOKENIZER, in_channels=3 + features), embed_dim=24,
                              depth=3, num_heads=2, drop_path_rate=0.),
                head=dict(type='PartSegHead', num_parts=7, hidden=(16, 12) if form == 'mae' else (16,), dropout=0.))


def build(*args, **kwargs):
    return ewa3d.build(model_cfg(*args, **kwargs))


def inputs(B=3, N=20, features=0, dtype=torch.float32):
    return dict(points=torch.randn(B, N, 3 + features, dtype=dtype), category=torch.arange(B) % 3)


# ---- one propagation ------------------------------------------------------------------------------------------------
def naive_propagation(layer, query, own, points, features, category=None):
    """Everything at every point, joined, through the whole weight."""
    index = torch.cdist(query, points).sort(-1).indices[..., :3]
    distance = torch.stack([(q.unsqueeze(1) - p[i]).square().sum(-1) for q, p, i in zip(query, points, index)])
    weight = 1 / (distance + 1e-8)
    weight = (weight / weight.sum(-1, keepdim=True)).unsqueeze(-1)
    carried = torch.stack([(f[i] * w).sum(1) for f, i, w in zip(features, index, weight)])
    columns = [own, carried]
    if layer.columns[0]:
        told = F.one_hot(category, layer.columns[0]).to(own.dtype)
        columns = [told.unsqueeze(1).expand(-1, own.shape[1], -1), *columns]
    x = torch.cat(columns, -1)
    for linear, norm in zip(layer.mlp_convs, layer.mlp_bns):
        x = norm(linear(x).transpose(1, 2)).transpose(1, 2).relu()
    return x


@pytest.mark.parametrize('categories', [0, 4])
@pytest.mark.parametrize('training', [True, False])
def test_propagation_forward_and_backward(categories, training):
    layer = FeaturePropagation(6, 5, (9, 7), categories).double().train(training)
    query, points = torch.randn(2, 11, 3).double(), torch.randn(2, 4, 3).double()
    own, features = torch.randn(2, 11, 5).double(), torch.randn(2, 4, 6).double()
    category = torch.tensor([3, 1]) if categories else None
    leaves = [x.requires_grad_() for x in (own, features, points)] + list(layer.parameters())
    found = layer(query, own, points, features, category)
    expected = naive_propagation(layer, query, own, points, features, category)
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    for x, twin in zip(torch.autograd.grad(found, leaves, gradient), torch.autograd.grad(expected, leaves, gradient)):
        torch.testing.assert_close(x, twin)


def test_edge_conv_between_two_sets():
    layer = EdgeConv(5, 8).double()
    x, query = torch.randn(2, 6, 5).double(), torch.randn(2, 9, 5).double()
    graph = neighbours(torch.randn(2, 9, 3), torch.randn(2, 6, 3), 4)
    near = torch.stack([cloud[rows] for cloud, rows in zip(x, graph)])  # (B, M, K, C)
    own = query.unsqueeze(2).expand_as(near)
    edges = layer[1](layer[0](torch.cat([near - own, own], -1)))
    torch.testing.assert_close(layer(x, graph, query), layer[2](edges).amax(2))
    torch.testing.assert_close(layer(x, graph[:, :6], x), layer(x, graph[:, :6]))


# ---- whole models ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('form', list(NECKS))
def test_output_and_gradients_are_those_of_the_published_form(form):
    model = build(form).double().train()
    data = inputs(dtype=torch.float64)
    tokens = model.backbone.tokenize(data)
    features = model.backbone.encode(tokens.x, tokens.pos, model.neck.out_indices)
    levels = model.neck.levels(data['points']) if form == 'bert' else ()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.momentum = 1.
    model(data)  # leaves the statistics of this batch
    model.eval()
    state = rename(model.state_dict(keep_vars=True), f'point_{form}_partseg', reverse=True)
    expected = log_probs(state, [x[:, 1:] for x in features], tokens.coord, data['points'], data['category'], *levels)
    found = model.head(model.neck(features, tokens.coord, data))
    torch.testing.assert_close(found, expected)
    gradient = torch.randn_like(expected)
    parts = {name: p for name, p in model.named_parameters() if not name.startswith('backbone.')}
    leaves = list(parts.values())
    for name, x, twin in zip(parts, torch.autograd.grad(found, leaves, gradient, retain_graph=True),
                             torch.autograd.grad(expected, leaves, gradient)):
        torch.testing.assert_close(x, twin, msg=lambda text, name=name: f'{name}: {text}')


@pytest.mark.parametrize('form', list(NECKS))
@pytest.mark.parametrize('features', [0, 3])
@pytest.mark.parametrize('categories', [0, 3])
def test_forms(form, features, categories):
    model = build(form, features, categories)
    data = inputs(features=features)
    if not categories:
        data.pop('category')
    scores = model(data)
    assert scores.shape == (3, 20, 7)
    torch.testing.assert_close(scores.exp().sum(-1), torch.ones(3, 20))
    scores.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in model.named_parameters())
    extracted = model.extract(data)
    assert extracted.x.shape[:2] == (3, 20) and (extracted.category is None) == (not categories)
    width = extracted.x.shape[-1] + (0 if extracted.shared is None else extracted.shared.shape[1])
    assert width == model.neck.out_channels() == model.head.in_channels


@pytest.mark.parametrize('form', list(NECKS))
def test_the_category_and_the_normals_count(form):
    model, data = build(form, 3).eval(), inputs(features=3)
    scores = model(data)
    assert not torch.allclose(model(dict(data, category=data['category'].roll(1))), scores)
    turned = torch.cat([data['points'][..., :3], data['points'][..., 3:].flip(-1)], -1)
    assert not torch.allclose(model(dict(data, points=turned)), scores)


@pytest.mark.parametrize('form', list(NECKS))
def test_clouds_of_a_batch_and_the_order_of_points_do_not_matter(form):
    model, data = build(form).eval(), inputs()
    scores = model(data)
    alone = model(dict(points=data['points'][1:2], category=data['category'][1:2]))
    torch.testing.assert_close(alone, scores[1:2], atol=1e-5, rtol=1e-5)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(19)])  # the first point is the start
    torch.testing.assert_close(model(dict(data, points=data['points'][:, order])), scores[:, order], atol=1e-5,
                               rtol=1e-5)


@pytest.mark.parametrize('form', list(NECKS))
def test_bfloat16(form):
    model, data = build(form), inputs()
    with torch.autocast('cpu', torch.bfloat16):
        scores = model(data)
        scores[..., 0].sum().backward()
    assert scores.dtype == torch.float32 and model.neck.propagation_0.mlp_convs[0].weight.grad.isfinite().all()
    torch.testing.assert_close(scores, model(data), atol=0.3, rtol=0.1)


def test_levels_are_the_tokenizers_rule():
    assert build('bert').neck.skip_origin is False
    cfg = model_cfg('bert')
    cfg['backbone']['tokenizer'].update(skip_origin=True)
    model = ewa3d.build(cfg)
    points = torch.randn(2, 20, 3)
    points[:, 1:9] *= 1e-3
    many, few = model.neck.levels(points)
    assert model.neck.skip_origin and torch.equal(many[:, :8], few)
    assert torch.equal(model.backbone.tokenize(points).coord, many[:, :6])


def test_expansion_touches_the_backbone_alone():
    model = build('mae')
    report = ewa3d.expand(model, [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)])
    assert 'neck' not in str(report) and 'head' not in str(report)


# ---- errors ---------------------------------------------------------------------------------------------------------
def test_categories_that_cannot_be():
    model = build()
    data = inputs()
    for bad, error, message in (
            (None, KeyError, r'told the category of each cloud: .*Pack.*category=True'),
            (torch.tensor([0, 1, 3]), ValueError, r'outside of the 3 categories, 0 … 2: \[0, 1, 3\]'),
            (torch.tensor([0, -1, 2]), ValueError, 'outside of the 3 categories'),
            (torch.tensor([0, 1]), ValueError, r'one integer a cloud, \(3,\), got torch.int64 of the shape \(2,\)'),
            (torch.zeros(3), ValueError, 'got torch.float32'), (torch.eye(3).long(), ValueError, r'shape \(3, 3\)'),
            (torch.tensor(1), ValueError, r'shape \(\)'), (torch.ones(3).bool(), ValueError, 'got torch.bool'),
            ([None, 1, 2], TypeError, r'one integer a cloud, \(3,\), got \[None'), ('abc', TypeError, "got 'abc'")):
        given = dict(points=data['points']) if bad is None else dict(data, category=bad)
        with pytest.raises(error, match=message):
            model(given)
    with pytest.raises(TypeError, match=r'one integer a cloud.* got None'):
        model(dict(data, category=None))
    with pytest.raises(KeyError, match='told the category'):
        model(data['points'])
    assert model(dict(data, category=[0, 1, 2])).shape == (3, 20, 7)
    assert model(dict(data, category=torch.tensor([0, 1, 2], dtype=torch.uint8))).shape == (3, 20, 7)


@pytest.mark.parametrize('change, error, message', [
    (dict(embed_dim=None), ValueError, 'embed_dim is not set'),
    (dict(num_categories=None), ValueError, 'num_categories is not set.* 0 makes a model that is not told'),
    (dict(num_categories=-1), ValueError, 'num_categories must be at least 0'),
    (dict(in_channels=2), ValueError, 'in_channels must be at least 3'),
    (dict(out_indices=()), ValueError, 'out_indices must name blocks'),
    (dict(out_indices=3), ValueError, 'out_indices must name blocks'),
    (dict(hidden=-1), ValueError, 'hidden must be at least 1')])
def test_settings_that_cannot_be(change, error, message):
    for cls in (PointFeaturePropagation, GraphPropagation):
        with pytest.raises(error, match=f'{cls.__name__}: {message}'):
            cls(**{**dict(embed_dim=8, num_categories=2), **change})


@pytest.mark.parametrize('change, message', [
    (dict(out_indices=(0, 1)), 'three blocks'), (dict(fps_levels=(8, 12)), 'the larger first'),
    (dict(fps_levels=(8,)), 'two numbers'), (dict(fps_levels=(8, 0)), 'at least 1'),
    (dict(num_neighbours=0), 'num_neighbours must be at least 1')])
def test_graph_settings_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        GraphPropagation(embed_dim=8, num_categories=2, **change)


def test_clouds_that_do_not_fit():
    with pytest.raises(ValueError, match=r'fps_levels=\(12, 8\) cannot be picked from 10 points'):
        build('bert')(inputs(N=10))
    with pytest.raises(ValueError, match=r'\(B, N, 6\), got \(3, 20, 3\)'):
        build('mae', features=3)(inputs())
    with pytest.raises(ValueError, match='9 is not one of the 3 blocks'):
        build(out_indices=(0, 9))(inputs())
