"""The query detector: its parts against naive twins, its calls, what it says of bad input."""
import itertools
import math

import pytest
import torch
from torch import nn

import ewa3d
from ewa3d import ops
from ewa3d.layers.block import Attention, Block
from ewa3d.layers.set_abstraction import SetAbstraction
from ewa3d.models.build import fill_model
from ewa3d.models.detection.coder import BoxCoder
from ewa3d.models.detection.decoder import FourierEmbedding
from ewa3d.models.detection.matcher import match
from ewa3d.models.weights import num_outputs
from ewa3d.ops import box3d_giou
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

TOKENIZER = dict(type='SetAbstraction', num_points=24, radius=0.5, num_neighbors=6, widths=(8, 16))
BACKBONE = dict(type='SetEncoder', tokenizer=TOKENIZER, embed_dim=16, depth=2, num_heads=2)
NECK = dict(type='QueryDecoder', num_queries=7, depth=2, num_heads=2)
HEAD = dict(type='DETRHead', num_classes=3, num_angle_bins=4)


def detector(**changes) -> nn.Module:
    parts = {name: {**part, **changes.pop(name, {})} for name, part in
             (('backbone', BACKBONE), ('neck', NECK), ('head', HEAD))}
    return MODELS.build(dict(type='TaskModel', **parts, **changes))


def boxes(count: int) -> torch.Tensor:
    return torch.cat([torch.rand(count, 3), 0.2 + torch.rand(count, 3), 6 * torch.rand(count, 1) - 3], 1)


def samples(*counts: int) -> list[Sample]:
    return [Sample(gt_boxes=boxes(n), gt_labels=torch.randint(3, (n,)), metainfo=dict(name=f'room{i}'))
            for i, n in enumerate(counts)]


POINTS = torch.rand(2, 60, 3, generator=torch.Generator().manual_seed(1)) * 2


# ---- attention to other tokens ---------------------------------------------------------------------------------------
def naive_attention(layer, query, key, value):
    """torch's own function, sequence first."""
    found, _ = nn.functional.multi_head_attention_forward(
        *(t.transpose(0, 1) for t in (query, key, value)), query.shape[-1], layer.num_heads, layer.qkv.weight,
        layer.qkv.bias, None, None, False, 0., layer.proj.weight, layer.proj.bias, training=False, need_weights=False)
    return found.transpose(0, 1)


class Wrapped(nn.Module):
    """What an adapter is to the attention: no plain linear layer."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize('wrap', [False, True])
def test_attention_with_positions_and_to_a_context(wrap):
    layer = Attention(12, num_heads=3, qkv_bias=True).double()
    for p in layer.parameters():
        nn.init.normal_(p)
    if wrap:
        layer.qkv = Wrapped(layer.qkv)
    x, pos, context, context_pos = (torch.randn(2, n, 12, dtype=torch.float64, requires_grad=True)
                                    for n in (5, 5, 9, 9))
    pairs = [(layer(x, pos=pos), naive_attention(layer, x + pos, x + pos, x)),
             (layer(x, pos=pos, context=context, context_pos=context_pos),
              naive_attention(layer, x + pos, context + context_pos, context)),
             (layer(x, context=context), naive_attention(layer, x, context, context))]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
        leaves = [t for t in (x, pos, context, context_pos) if torch.autograd.grad(
            expected.sum(), t, allow_unused=True, retain_graph=True)[0] is not None]
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), leaves) for y in (found, expected))):
            torch.testing.assert_close(a, b)


def test_a_block_with_a_slot_for_cross_attention():
    block = Block(12, 3, cross=True, qkv_bias=True, init_values=0.5).double().eval()
    x, context, pos = (torch.randn(2, n, 12, dtype=torch.float64) for n in (5, 9, 5))
    y = x + block.ls1(block.attn(block.norm1(x), pos=pos))
    y = y + block.ls_cross(block.cross(block.norm_cross(y), context=context, pos=pos))
    torch.testing.assert_close(block(x, context=context, pos=pos), y + block.ls2(block.mlp(block.norm2(y))))
    with pytest.raises(ValueError, match='none was given'):
        block(x)
    with pytest.raises(ValueError, match='build it with cross=True'):
        Block(12, 3)(x.float(), context=context.float())


# ---- parts -----------------------------------------------------------------------------------------------------------
def test_set_abstraction_is_a_tokenizer():
    layer = SetAbstraction(num_points=5, radius=0.7, num_neighbors=4, widths=(6, 8), in_channels=5).eval()
    points = torch.rand(2, 30, 5)
    tokens = layer(dict(points=points))
    assert tokens.x.shape == tokens.pos.shape == (2, 5, 8) and not tokens.pos.any() and tokens.target is None
    assert torch.equal(tokens.coord[:, 0], points[:, 0, :3])
    b, m = 1, 3  # one token by hand
    center = tokens.coord[b, m]
    near = points[b][(points[b, :, :3] - center).norm(dim=1) < 0.7][:4]
    x = torch.cat([(near[:, :3] - center) / 0.7, near[:, 3:]], 1)
    for linear, norm in zip(layer.mlp_convs, layer.mlp_bns):
        x = norm(linear(x)).relu()
    torch.testing.assert_close(tokens.x[b, m], x.amax(0))
    with pytest.raises(ValueError, match='4 points are too few for num_points=5 tokens'):
        layer(torch.rand(1, 4, 5))
    with pytest.raises(ValueError, match=r'points must have the shape \(B, N, 5\), got \(1, 9, 3\)'):
        layer(torch.rand(1, 9, 3))


def test_radii_of_the_masked_encoder():
    masked = dict(depth=2, mask_radius=(0.4, None))
    published, plain = (MODELS.build({**BACKBONE, **masked, 'mask_radius_compat': compat}) for compat in (True, False))
    assert published.radii == (pytest.approx(0.16), 0.) and plain.radii == (0.4, 0.)
    for bad in ((0.4,), 'ab', (0.4, -1.), 0.4):
        with pytest.raises((TypeError, ValueError), match='mask_radius'):
            MODELS.build({**BACKBONE, 'mask_radius': bad})


def test_tokens_far_from_each_other_do_not_meet_in_the_masked_encoder():
    encoder = MODELS.build({**BACKBONE, 'mask_radius': (0.5, 0.5), 'mask_radius_compat': False}).eval()
    x, coord = torch.randn(1, 24, 16), torch.rand(1, 24, 3) * 0.1
    coord[:, 12:] += 10
    changed = x.clone()
    changed[:, 12:] = torch.randn(1, 12, 16)
    torch.testing.assert_close(encoder.encode(x, coord)[0][:, :12], encoder.encode(changed, coord)[0][:, :12])
    assert not torch.allclose(encoder.encode(x, coord)[0][:, 12:], encoder.encode(changed, coord)[0][:, 12:])


def test_downsampling_moves_the_tokens():
    thinner = dict(type='SetAbstraction', num_points=10, radius=0.8, num_neighbors=5, widths=(16,))
    encoder = MODELS.build({**BACKBONE, 'downsample': thinner})
    features, coord = encoder.located(POINTS)
    assert features[0].shape == (2, 10, 16) and coord.shape == (2, 10, 3)
    assert encoder.downsample.in_channels == 19
    with pytest.raises(ValueError, match='embed_dim=8, the blocks expect embed_dim=16'):
        MODELS.build({**BACKBONE, 'downsample': {**thinner, 'widths': (8,)}})
    with pytest.raises(ValueError, match=r'out_indices=\(0,\): this encoder gives the features of its last block'):
        encoder.located(POINTS, (0,))


def test_fourier_embedding_of_a_flat_cloud():
    embedding = FourierEmbedding(8)
    coord = torch.rand(1, 5, 3) * torch.tensor([1., 1., 0.])
    low, high = coord.amin(1), coord.amax(1)
    x = embedding(coord, low, high)
    angle = 2 * math.pi * torch.cat([(coord - low)[..., :2] / (high - low)[:, :2], torch.zeros(1, 5, 1)], -1)
    angle = angle @ embedding.gauss_B
    torch.testing.assert_close(x, torch.cat([angle.sin(), angle.cos()], -1))
    with pytest.raises(ValueError, match='dim=7'):
        FourierEmbedding(7)


@pytest.mark.parametrize('bins', [1, 4, 12])
def test_headings_there_and_back(bins):
    coder = BoxCoder(bins)
    angle = torch.linspace(-9, 9, 301, dtype=torch.float64)
    chosen, residual = coder.encode_angle(angle)
    assert chosen.min() >= 0 and chosen.max() < bins and (residual.abs() <= math.pi / bins + 1e-9).all()
    back = coder.decode_angle(chosen, residual)
    torch.testing.assert_close((back - angle).cos(), torch.ones_like(angle))
    assert (back <= math.pi).all()


def test_headings_of_the_published_code(reference):
    ref = reference('detection_boxes')
    chosen, residual = BoxCoder(12).encode_angle(ref.inputs['angle_list'])
    assert torch.equal(chosen, ref.expected['angle_class'])
    torch.testing.assert_close(residual, ref.expected['angle_residual'])
    torch.testing.assert_close(BoxCoder(12).decode_angle(chosen, residual), ref.expected['angle_back'])


@pytest.mark.parametrize('objects', [0, 1, 3, 4])
def test_matching_is_the_best_of_all_assignments(objects):
    cost = torch.randn(2, 2, 5, 4)
    clouds, queries, found = match(cost, [objects, 2])
    for i, count in enumerate([objects, 2] * 2):
        mine = clouds == i
        assert sorted(found[mine].tolist()) == list(range(count))
        total = cost.flatten(0, 1)[i][queries[mine], found[mine]].sum()
        best = min(sum(float(cost.flatten(0, 1)[i][q, m]) for m, q in enumerate(order))
                   for order in itertools.permutations(range(5), count))
        assert total == pytest.approx(best, abs=1e-5)
    cost[1, 0, 0, 0] = float('nan')
    if objects:
        with pytest.raises(ValueError, match='cloud 0 at decoder layer 1 are not finite'):
            match(cost, [objects, 2])


# ---- the whole model -------------------------------------------------------------------------------------------------
def test_calls():
    model = detector().eval()
    raw = model(dict(points=POINTS))
    assert raw['sem_cls_logits'].shape == (2, 7, 4) and raw['angle'].shape == (2, 7) and len(raw['aux']) == 1
    assert raw['center'].shape == raw['size'].shape == raw['aux'][0]['center'].shape == (2, 7, 3)
    assert (raw['size'] > 0).all() and (raw['size'] <= POINTS.amax(1)[:, None] - POINTS.amin(1)[:, None]).all()
    for given in (None, samples(2, 0)):
        found = model(POINTS, given, mode='predict')
        probabilities = raw['sem_cls_logits'].softmax(-1)
        for i, sample in enumerate(found):
            assert sample.pred_boxes.shape == (7, 7) and torch.equal(sample.pred_boxes[:, :3], raw['center'][i])
            assert torch.equal(sample.pred_boxes[:, 6], -raw['angle'][i])
            torch.testing.assert_close(sample.pred_scores, probabilities[i, :, :-1])
            torch.testing.assert_close(sample.pred_objectness, 1 - probabilities[i, :, -1])
    with pytest.raises(ValueError, match="mode='loss' needs data_samples"):
        model(POINTS, mode='loss')


def test_losses_one_object_after_another():
    """The loss of the last layer, written out with loops."""
    model = detector(head=dict(costs=dict(center=2., objectness=1.), loss_weights=dict(no_object=0.4))).eval()
    truth = samples(3, 2)
    feats = model.extract(POINTS)
    predicted = {name: value[-1].detach() for name, value in model.head.predictions(feats).items()}
    losses = {name: value.detach() for name, value in model.head.loss(feats, truth).items()}
    sums = dict.fromkeys(('center', 'size', 'angle_cls', 'angle_reg', 'giou'), 0.)
    sem_cls = weight = 0.
    for b, sample in enumerate(truth):
        low, extent = feats.low[b], feats.high[b] - feats.low[b]
        p = predicted['sem_cls_logits'][b].softmax(-1)
        guess = torch.cat([predicted['center'][b], predicted['size'][b], -predicted['angle'][b, :, None]], 1)
        giou = box3d_giou(guess, sample.gt_boxes)
        center = (sample.gt_boxes[:, :3] - low) / extent
        distance = (predicted['center_normalized'][b][:, None] - center).abs().sum(-1)
        cost = -p[:, sample.gt_labels] - (1 - p[:, -1:]) + 2 * distance - 2 * giou
        order = min(itertools.permutations(range(7), len(center)), key=lambda o: sum(
            float(cost[q, m]) for m, q in enumerate(o)))
        label = torch.full((7,), 3)
        for m, q in enumerate(order):
            label[q] = sample.gt_labels[m]
            heading = float(-sample.gt_boxes[m, 6]) % (2 * math.pi)
            chosen = round(heading / (math.pi / 2)) % 4
            residual = (heading - chosen * math.pi / 2 + math.pi) % (2 * math.pi) - math.pi
            error = float(predicted['angle_residual_normalized'][b, q, chosen]) - residual / (math.pi / 4)
            sums['center'] += float(distance[q, m])
            sums['size'] += float((predicted['size_normalized'][b, q] - sample.gt_boxes[m, 3:6] / extent).abs().sum())
            sums['angle_cls'] -= float(predicted['angle_logits'][b, q].log_softmax(-1)[chosen])
            sums['angle_reg'] += error ** 2 / 2 if abs(error) < 1 else abs(error) - 0.5
            sums['giou'] += 1 - float(giou[q, m])
        for q in range(7):
            w = 0.4 if label[q] == 3 else 1.
            sem_cls, weight = sem_cls - w * float(p[q, label[q]].log()), weight + w
    assert float(losses['loss_sem_cls']) == pytest.approx(sem_cls / weight, abs=1e-4)
    for name, value in sums.items():
        assert float(losses[f'loss_{name}']) == pytest.approx(model.head.loss_weights[name] * value / 5, abs=1e-4), name


def test_scenes_without_boxes():
    model = detector().train()
    for counts in ((0, 0), (0, 3)):
        losses = model(POINTS, samples(*counts), mode='loss')
        total, _ = model.parse_losses(losses)
        total.backward()
        assert torch.isfinite(total) and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert len(losses) == 13
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('giou', ['exact', 'official'])
@pytest.mark.parametrize('bins', [1, 4])
def test_it_learns_two_scenes(giou, bins):
    model = detector(backbone=dict(proj_drop=0., attn_drop=0.), neck=dict(proj_drop=0., attn_drop=0.),
                     head=dict(giou=giou, dropout=0., num_angle_bins=bins)).train()
    truth = samples(2, 1)
    optimizer, totals = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(25):
        optimizer.zero_grad()
        totals.append(model.parse_losses(model(POINTS, truth, mode='loss'))[0])
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.8 * totals[0]


def test_autocast_keeps_coordinates():
    model = detector(backbone=dict(mask_radius=(0.4, 0.8))).train()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = model(POINTS, samples(2, 1), mode='loss')
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert model.extract(POINTS).coord.dtype == torch.float32
    sum(losses.values()).backward()


def test_experts_reach_every_ffn_and_train():
    rules = [dict(type='EWAFFN', at=f'{part}.blocks.*.mlp', num_experts=2) for part in ('backbone', 'neck')]
    torch.manual_seed(3)
    plain = detector().eval()
    torch.manual_seed(3)
    model = detector(expand=rules).eval()
    assert len(model.expand_report) == 4
    torch.testing.assert_close(model(POINTS)['center'], plain(POINTS)['center'])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sum(model(POINTS, samples(2, 1), mode='loss').values()).backward()
    optimizer.step()
    before = model.eval()(POINTS)['center']
    ewa3d.fuse(model)
    torch.testing.assert_close(model(POINTS)['center'], before)
    assert list(model.state_dict()) == list(plain.state_dict())


def test_a_point_mae_backbone_as_the_encoder():
    tokenizer = dict(type='PointPatchEmbed', num_groups=24, group_size=6, widths=(8, 8, 16))
    model = detector(backbone=dict(type='TokenEncoder', tokenizer=tokenizer, cls_token=True)).eval()
    feats = model.extract(POINTS)
    assert feats.x.shape == (2, 2, 7, 16) and model.neck.num_prefix_tokens == 1
    assert torch.equal(feats.coord[:, 0], POINTS[:, 0])
    assert torch.isfinite(sum(model(POINTS, samples(2, 1), mode='loss').values()))


def test_queries_start_from_what_is_around_them():
    """Each from the maximum over the tokens in its ball, as :class:`SetAbstraction` says; without, from zero."""
    torch.manual_seed(0)
    content = dict(type='SetAbstraction', radius=0.8, num_neighbors=5)
    model = detector(neck=dict(content=content)).eval()
    plain = detector()
    assert sorted(set(model.state_dict()) - set(plain.state_dict()))[0] == 'neck.content.mlp_bns.0.bias'
    (x,), coord = model.backbone.located(POINTS)
    queries, start = model.neck.start(coord, model.neck.memory(x))
    torch.testing.assert_close(queries, plain.neck.start(coord, x)[0])
    assert start.shape == (2, 7, 16) and plain.neck.start(coord, x)[1] is None
    ball = ops.ball_query(queries, coord, 0.8, 5)
    memory = model.neck.memory(x)
    near = torch.cat([(ops.gather(coord, ball) - queries.unsqueeze(2)) / 0.8, ops.gather(memory, ball)], -1)
    for layer, norm in zip(model.neck.content.mlp_convs, model.neck.content.mlp_bns):
        near = norm(nn.functional.linear(near, layer.weight).flatten(0, 2)).view(*near.shape[:3], -1).relu()
    torch.testing.assert_close(start, near.amax(2))
    sum(model.train()(POINTS, samples(2, 1), mode='loss').values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.neck.content.mlp_convs.parameters())
    with pytest.raises(ValueError, match='content gives 5 places 16 features, 7 queries have decoder_dim=16'):
        detector(neck=dict(content={**content, 'num_points': 5}))


@pytest.mark.parametrize('decoder_dim', [16, 8])
def test_a_pretrained_backbone_leaves_the_decoder_alone(decoder_dim):
    tokenizer = dict(type='PointPatchEmbed', num_groups=24, group_size=6, widths=(8, 8, 16))
    backbone = dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=16, depth=2, num_heads=2)
    pretrained = MODELS.build(dict(type='MaskedAutoencoder', backbone=backbone, decoder_depth=1, decoder_num_heads=2))
    nn.init.constant_(pretrained.decoder.norm.weight, 5.)
    neck = dict(NECK, decoder_dim=decoder_dim)
    model = MODELS.build(dict(type='TaskModel', backbone=backbone, neck=neck, head=HEAD,
                              pretrained=dict(source=pretrained.state_dict(), strict=False)))
    assert model.load_report.layout == 'ewa3d'
    assert {'backbone.' + key for key in pretrained.backbone.state_dict()} == set(model.load_report.matched)
    assert torch.equal(model.backbone.blocks[1].mlp.fc1.weight, pretrained.backbone.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.neck.norm.weight, torch.ones(decoder_dim))


def test_features_of_points():
    model = detector(backbone=dict(tokenizer={**TOKENIZER, 'in_channels': 6})).eval()
    points = torch.cat([POINTS, torch.rand(2, 60, 3) + 5], -1)
    feats = model.extract(points)
    torch.testing.assert_close(feats.high, POINTS.amax(1))
    with pytest.raises(ValueError, match=r'points must have the shape \(B, N, 6\)'):
        model(POINTS)


def test_the_number_of_classes_comes_from_the_data_or_a_checkpoint():
    cfg = dict(backbone=BACKBONE, neck=NECK, head=dict(type='DETRHead'))
    fill_model(cfg, dict(classes=['bed', 'chair']), 'training')
    assert cfg['head']['num_classes'] == 2
    assert num_outputs(dict(state_dict=detector().state_dict())) == 3


# ---- bad input -------------------------------------------------------------------------------------------------------
def bad(**changes) -> list[Sample]:
    sample = samples(2)[0]
    for name, value in changes.items():
        setattr(sample, name, value)
    return [sample, samples(1)[0]]


@pytest.mark.parametrize('given, message', [
    (lambda: samples(8, 1), "sample 'room0' has 8 boxes, the model 7 queries"),
    (lambda: bad(gt_boxes=torch.full((2, 7), float('nan'))), "'room0': box 0 must have finite values"),
    (lambda: bad(gt_boxes=torch.cat([boxes(1), torch.tensor([[0., 0, 0, 1, 0, 1, 0]])])), 'box 1 must .* above 0'),
    (lambda: bad(gt_labels=torch.tensor([0, 3])), "'room0' has the label 3; the head has 3 classes, 0 to 2"),
    (lambda: bad(gt_labels=torch.tensor([0])), r'gt_boxes \(M, 7\) and gt_labels \(M,\) expected, got \(2, 7\) and'),
    (lambda: bad(gt_boxes=torch.zeros(2, 6)), r'got \(2, 6\)'),
    (lambda: [Sample(metainfo=dict(index=4)), samples(1)[0]], 'sample 4 has no gt_boxes and gt_labels')])
def test_annotations_that_are_wrong(given, message):
    with pytest.raises(ValueError, match=message):
        detector()(POINTS, given(), mode='loss')


def test_clouds_that_are_too_small():
    with pytest.raises(ValueError, match='20 points are too few for num_points=24 tokens'):
        detector()(POINTS[:, :20])
    with pytest.raises(ValueError, match='num_queries=30 queries cannot be at 24 tokens'):
        detector(neck=dict(num_queries=30))(POINTS)
    with pytest.raises(ValueError, match='NaN or infinite'):
        detector()(POINTS.clone().index_fill_(1, torch.tensor([3]), float('inf')))


@pytest.mark.parametrize('part, change, error, message', [
    ('head', dict(num_classes=None), ValueError, 'num_classes is not set'),
    ('head', dict(costs=dict(iou=1.)), TypeError, "costs has no 'iou'; did you mean 'giou'"),
    ('head', dict(loss_weights=dict(size=-1.)), ValueError, 'loss_weights.size must lie in'),
    ('head', dict(loss_weights=dict(no_object=0)), ValueError, 'no_object must be above 0'),
    ('head', dict(giou='rotated'), ValueError, "giou='rotated'"),
    ('head', dict(num_angle_bins=0), ValueError, 'num_angle_bins must be at least 1'),
    ('neck', dict(num_queries=0), ValueError, 'num_queries must be at least 1'),
    ('neck', dict(out_indices=(0, 1)), ValueError, 'out_indices must name one block'),
    ('neck', dict(proj_drop=2.), ValueError, 'proj_drop must lie in'),
    ('backbone', dict(act_layer='tanh'), ValueError, "act_layer='tanh'"),
    ('backbone', dict(depth=0), ValueError, 'depth must be at least 1'),
    ('backbone', dict(num_heads=3), ValueError, 'dim=16 cannot be split among num_heads=3')])
def test_settings_that_are_wrong(part, change, error, message):
    with pytest.raises(error, match=message):
        detector(**{part: change})


@pytest.mark.parametrize('change, error', [
    (dict(widths=()), ValueError), (dict(widths='ab'), ValueError), (dict(radius=0), ValueError),
    (dict(num_points=2.), TypeError), (dict(in_channels=2), ValueError), (dict(widths=(4, 0)), ValueError)])
def test_set_abstractions_that_are_wrong(change, error):
    with pytest.raises(error, match='SetAbstraction: .*' + next(iter(change))):
        SetAbstraction(**change)
