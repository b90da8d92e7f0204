import copy

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import nn

import ewa3d
from ewa3d.models.backbone import TokenEncoder
from ewa3d.models.heads import ClsHead
from ewa3d.models.necks import TokenPool
from ewa3d.models.preprocessor import Preprocessor
from ewa3d.models.task import TaskModel
from ewa3d.models.weights import load_plain, rename
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

TOKENIZER = dict(type='PointPatchEmbed', num_groups=6, group_size=4, widths=(8, 12, 16), pos_dim=8)


def backbone_cfg(**kwargs):
    return {**dict(type='TokenEncoder', tokenizer=TOKENIZER, embed_dim=24, depth=3, num_heads=2), **kwargs}


def model_cfg(**kwargs):
    return {**dict(type='TaskModel', backbone=backbone_cfg(), neck=dict(type='TokenPool'),
                   head=dict(type='ClsHead', num_classes=5, hidden=16)), **kwargs}


def build(**kwargs) -> TaskModel:
    return ewa3d.build(model_cfg(**kwargs))


def samples(n, classes=5):
    return [Sample(gt_label=torch.tensor(i % classes), metainfo=dict(name=f'cloud {i}', index=i)) for i in range(n)]


def batch(n, N=20, features=3):
    """What the collate function hands over."""
    return dict(inputs=dict(points=list(torch.randn(n, N, features))), data_samples=samples(n))


@pytest.fixture
def points():
    return torch.randn(4, 20, 3)


# ---- backbone -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('pos', ['every', 'first'])
@pytest.mark.parametrize('cls_token', [True, False])
def test_encode_is_the_definition(points, pos, cls_token):
    model = MODELS.build(backbone_cfg(pos=pos, cls_token=cls_token)).eval()
    tokens = model.tokenize(dict(points=points))
    x, p = tokens.x, tokens.pos
    if cls_token:
        x = torch.cat([model.cls_token.repeat(4, 1, 1), x], 1)
        p = torch.cat([model.cls_pos.repeat(4, 1, 1), p], 1)
    outputs = []
    for i, block in enumerate(model.blocks):
        x = block(x + p if pos == 'every' or i == 0 else x)
        outputs.append(x)
    assert model.num_prefix_tokens == int(cls_token)
    torch.testing.assert_close(model(dict(points=points)), model.norm(x))
    raw = model.encode(tokens.x, tokens.pos, out_indices=(2, 0, -2), norm=False)
    for a, b in zip(raw, (outputs[2], outputs[0], outputs[1])):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(model.encode(tokens.x, tokens.pos, out_indices=[0])[0], model.norm(outputs[0]))


def test_encode_takes_some_of_the_tokens(points):
    model = MODELS.build(backbone_cfg()).eval()
    tokens = model.tokenize(points)
    assert model.encode(tokens.x[:, :2], tokens.pos[:, :2]).shape == (4, 3, 24)


@pytest.mark.parametrize('indices', [(3,), (-4,), (0, -3), ('1',), (1.0,)])
def test_out_indices_are_checked(points, indices):
    model = MODELS.build(backbone_cfg())
    with pytest.raises(ValueError, match='out_indices'):
        model(points, out_indices=indices)


def test_drop_path_rises_linearly():
    blocks = MODELS.build(backbone_cfg(depth=5, drop_path_rate=0.2)).blocks
    rates = [getattr(block.drop_path1, 'drop_prob', 0.) for block in blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_norm_eps():
    for eps, expected in ((None, 1e-5), (1e-6, 1e-6)):
        model = MODELS.build(backbone_cfg(**({} if eps is None else dict(norm_eps=eps))))
        assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {expected}


@pytest.mark.parametrize('kwargs, message', [
    (dict(pos='second'), 'second'), (dict(depth=0), 'depth'), (dict(num_heads=5), 'num_heads=5'),
    (dict(tokenizer=dict(TOKENIZER, embed_dim=32)), 'embed_dim=32'), (dict(drop_path_rate=1.), 'drop_path_rate.*1.0'),
    (dict(drop_path_rate=-0.1), 'drop_path_rate.*-0.1'), (dict(mlp_ratio=0), 'mlp_ratio.*0'),
    (dict(num_heads=0), 'num_heads.*0'), (dict(proj_drop=1.5), 'proj_drop.*1.5'), (dict(attn_drop=-1), 'attn_drop'),
    (dict(norm_eps=float('nan')), 'norm_eps.*nan'), (dict(embed_dim=0), 'embed_dim.*0')])
def test_backbone_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(backbone_cfg(**kwargs))


@pytest.mark.parametrize('name', ['embed_dim', 'depth', 'num_heads', 'mlp_ratio', 'drop_path_rate', 'proj_drop',
                                  'attn_drop', 'norm_eps'])
@pytest.mark.parametrize('value', ['abc', True])
def test_backbone_refuses_what_is_no_number(name, value):
    with pytest.raises(TypeError, match=f'{name} must be an? (number|integer), got {value!r}'):
        MODELS.build(backbone_cfg(**{name: value}))


def test_published_size():
    model = ewa3d.build(dict(
        type='TaskModel', backbone=dict(type='TokenEncoder', tokenizer=dict(type='PointPatchEmbed')),
        neck=dict(type='TokenPool'), head=dict(type='ClsHead', num_classes=40)))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 22.10
    block = model.backbone.blocks[0]
    assert round(sum(p.numel() for p in block.parameters()) / 1e6, 3) == 1.773


# ---- neck -----------------------------------------------------------------------------------------------------------
def test_token_pool():
    x = torch.randn(2, 5, 3)
    parts = dict(cls=x[:, 0], max=x[:, 1:].max(1)[0], mean=x[:, 1:].mean(1))
    for mode in ('cls', 'max', 'mean', 'cls+max', 'max+cls', 'cls+mean', 'cls+max+mean'):
        pool = TokenPool(mode)
        torch.testing.assert_close(pool(x), torch.cat([parts[part] for part in mode.split('+')], -1))
        assert pool.out_channels(3) == pool(x).shape[1]
    torch.testing.assert_close(TokenPool('max', num_prefix_tokens=0)(x), x.max(1)[0])


@pytest.mark.parametrize('mode', ['median', '', 'cls+cls', 'cls,max'])
def test_token_pool_refuses(mode):
    with pytest.raises(ValueError, match='mode'):
        TokenPool(mode)


def test_pooling_a_class_token_that_is_not_there():
    with pytest.raises(ValueError, match='cls_token=False'):
        build(backbone=backbone_cfg(cls_token=False))
    model = build(backbone=backbone_cfg(cls_token=False), neck=dict(type='TokenPool', mode='max'))
    assert model.neck.num_prefix_tokens == 0 and model.head.in_channels == 24


# ---- head -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('form, kinds', [
    ('mlp', {0: nn.Linear, 1: nn.BatchNorm1d, 4: nn.Linear, 5: nn.BatchNorm1d, 8: nn.Linear}),
    ('mlp_nobn', {0: nn.Linear, 3: nn.Linear}), ('linear', {0: nn.Linear})])
def test_head_forms(form, kinds):
    head = ClsHead(7, 10, form=form)
    assert {int(k.split('.')[1]) for k in head.state_dict()} == set(kinds)
    assert all(type(head.layers[i]) is kind for i, kind in kinds.items())
    assert head(torch.randn(3, 10)).shape == (3, 7)


@pytest.mark.parametrize('smoothing', [0., 0.1])
def test_head_loss(smoothing):
    head = ClsHead(5, 10, form='linear', label_smoothing=smoothing)
    feats = torch.randn(6, 10)
    losses = head.loss(feats, samples(6))
    target = torch.arange(6) % 5
    log_p = head(feats).log_softmax(-1)
    naive = -((1 - smoothing) * log_p[range(6), target] + smoothing * log_p.mean(1)).mean()
    torch.testing.assert_close(losses['loss_cls'], naive)
    assert losses['acc'] == (log_p.argmax(1) == target).float().mean() * 100
    assert [key for key in losses if 'loss' in key] == ['loss_cls']


def test_head_predict():
    head = ClsHead(5, 10, form='linear')
    feats, given = torch.randn(4, 10), samples(4)
    done = head.predict(feats, given)
    assert done[2] is given[2]
    scores = head(feats).softmax(-1)
    for i, sample in enumerate(done):
        torch.testing.assert_close(sample.pred_scores, scores[i])
        assert sample.pred_label == scores[i].argmax() and sample.pred_label.dtype == torch.int64
    assert len(head.predict(feats)) == 4


def test_head_refuses():
    with pytest.raises(ValueError, match=r'num_classes.*tools/train.py'):
        ClsHead(in_channels=4)
    with pytest.raises(ValueError, match='in_channels'):
        ClsHead(num_classes=4)
    for kwargs in (dict(num_classes=0), dict(in_channels=0), dict(form='deep'), dict(label_smoothing=1.5),
                   dict(hidden=0), dict(dropout=-0.5)):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            ClsHead(**{**dict(num_classes=3, in_channels=4), **kwargs})
    for name, value in (('num_classes', 2.5), ('num_classes', 'abc'), ('in_channels', 'abc'), ('hidden', 'abc'),
                        ('dropout', 'abc'), ('label_smoothing', 'abc')):
        with pytest.raises(TypeError, match=f'ClsHead: {name} must be .*{value!r}'):
            ClsHead(**{**dict(num_classes=3, in_channels=4), name: value})
    head = ClsHead(3, 10)
    with pytest.raises(ValueError, match='TokenPool'):
        head(torch.randn(2, 5, 10))
    with pytest.raises(ValueError, match=r"'cloud 3' has the label 3.*3 classes"):
        head.loss(torch.randn(4, 10), samples(4))
    with pytest.raises(ValueError, match=r"'x' has no gt_label"):
        head.loss(torch.randn(1, 10), [Sample(metainfo=dict(name='x'))])


def test_labels_may_be_plain_numbers():
    head = ClsHead(5, 10, form='linear')
    assert head.loss(torch.randn(2, 10), [Sample(gt_label=1), Sample(gt_label=torch.tensor([4]))])['loss_cls'] > 0


# ---- preprocessor ---------------------------------------------------------------------------------------------------
def test_preprocessor_stacks():
    data = batch(3)
    out = Preprocessor()(data, training=True)
    assert torch.equal(out['inputs']['points'], torch.stack(data['inputs']['points']))
    assert out['data_samples'] is data['data_samples']
    stacked = torch.randn(2, 5, 3)
    assert torch.equal(Preprocessor()(dict(inputs=dict(points=stacked)))['inputs']['points'], stacked)


def test_preprocessor_names_the_sample():
    data = batch(3)
    data['inputs']['points'][1] = torch.randn(19, 3)
    with pytest.raises(ValueError, match=r"'cloud 1' has \(19, 3\).*'cloud 0' has \(20, 3\).*Resample"):
        Preprocessor()(data)
    data = batch(3)
    data['inputs']['points'][2][4, 0] = float('inf')
    data['inputs']['points'][0][4, 0] = float('nan')
    with pytest.raises(ValueError, match="'cloud 0', sample 'cloud 2'"):
        Preprocessor()(data)
    del data['data_samples']
    with pytest.raises(ValueError, match='sample 2 of the batch'):
        Preprocessor()(data)
    with pytest.raises(ValueError, match='points'):
        Preprocessor()(dict(points=torch.randn(2, 5, 3)))


def test_preprocessor_accepts_huge_values():
    assert Preprocessor()(dict(inputs=dict(points=torch.full((2, 5, 3), 3e38))))['inputs']['points'].max() > 1e38


# ---- task model -----------------------------------------------------------------------------------------------------
def test_modes(points):
    model = build().eval()
    logits = model(dict(points=points))
    assert logits.shape == (4, 5)
    assert torch.equal(model(points), logits)
    assert torch.equal(model.head(model.extract(points)), logits)
    assert set(model(dict(points=points), samples(4), mode='loss')) == {'loss_cls', 'acc'}
    predicted = model(dict(points=points), samples(4), mode='predict')
    assert [s.pred_label for s in predicted] == logits.argmax(1).tolist()
    assert predicted[0].name == 'cloud 0'
    with pytest.raises(ValueError, match=r"'tensors'.*'tensor'"):
        model(points, mode='tensors')
    with pytest.raises(ValueError, match='data_samples'):
        model(points, mode='loss')


def test_inputs_without_points(points):
    with pytest.raises(KeyError, match=r"'points', found \['point'\]"):
        build()(dict(point=points))


def test_model_without_head_gives_features(points):
    model = ewa3d.build(dict(type='TaskModel', backbone=backbone_cfg(), neck=dict(type='TokenPool', mode='mean')))
    assert model(points).shape == (4, 24)
    with pytest.raises(ValueError, match='head'):
        model(points, samples(4), mode='loss')


def test_training_step_lowers_the_loss():
    model = build(head=dict(type='ClsHead', num_classes=5, hidden=16, dropout=0.))
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=3e-3))
    data = batch(8)
    losses = [model.train_step(data, wrapper)['loss'].item() for _ in range(25)]
    assert losses[-1] < losses[0] * 0.8
    assert len(model.val_step(data)) == 8


def test_mmengine_does_not_initialise_again(points):
    class Alarming(nn.Linear):
        def init_weights(self):
            raise AssertionError('would wipe loaded weights')

    model = build()
    model.head.layers[8] = Alarming(16, 5)
    before = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_same_seed_same_model_and_step(points):
    def run():
        torch.manual_seed(3)
        model = build()
        losses = model(points, samples(4), mode='loss')
        losses['loss_cls'].backward()
        return [losses['loss_cls'].detach(), *(p.grad for p in model.parameters())]

    for a, b in zip(run(), run()):
        assert torch.equal(a, b)


def test_bf16_autocast(points):
    model = build()
    with torch.autocast('cpu', torch.bfloat16):
        losses = model(points, samples(4), mode='loss')
    assert losses['loss_cls'].dtype == torch.float32
    losses['loss_cls'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        low = model(points)
    torch.testing.assert_close(low.float(), model(points), atol=0.05, rtol=0.05)


def test_compiles_without_graph_breaks(points):
    model = build(backbone=backbone_cfg(depth=1)).eval()
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(dict(points=points)), model(dict(points=points)))


def test_parts_may_be_modules():
    backbone = MODELS.build(backbone_cfg())
    model = TaskModel(backbone, TokenPool(), ClsHead(3, 48))
    assert model.backbone is backbone and isinstance(model.data_preprocessor, Preprocessor)


def test_wrong_keys_name_the_right_ones():
    with pytest.raises(TypeError, match='drop_path_rate'):
        build(backbone=backbone_cfg(drop_path=0.1))
    with pytest.raises(KeyError, match='TokenEncoder'):
        build(backbone=backbone_cfg(type='TokenEncodr'))
    with pytest.raises(TypeError, match='backbone'):
        build(backbon=1)


# ---- building and weights -------------------------------------------------------------------------------------------
def test_build_from_every_kind_of_config(tmp_path):
    path = tmp_path / 'config.py'
    cfg = Config(dict(model=model_cfg()))
    cfg.dump(path)
    reference = build().state_dict()
    for config in (path, str(path), cfg, dict(model=model_cfg()), model_cfg(), cfg.model):
        model = ewa3d.build(config, num_classes=9)
        assert model.head.num_classes == 9 and model.training
        assert set(model.state_dict()) == set(reference)
    assert cfg.model.head.num_classes == 5  # the config is left alone
    with pytest.raises(FileNotFoundError, match=r'nowhere\.py'):
        ewa3d.build(tmp_path / 'nowhere.py')
    with pytest.raises(KeyError, match='type'):
        ewa3d.build(dict(train_cfg=dict()))
    with pytest.raises(ValueError, match='num_classes'):
        build(head=dict(type='ClsHead'))


def test_build_with_checkpoint(tmp_path, points):
    model = build().eval()
    path = tmp_path / 'plain.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=list('abcde')))), path)
    cfg = model_cfg(head=dict(type='ClsHead', hidden=16), pretrained='not read: the checkpoint replaces it')
    loaded = ewa3d.build(cfg, path)
    assert not loaded.training and loaded.head.num_classes == 5
    assert torch.equal(loaded(points), model(points))


def test_pretrained_loads_before_expanding(tmp_path, points):
    plain = build(head=dict(type='ClsHead', num_classes=8, hidden=16))
    path = tmp_path / 'plain.pth'
    torch.save(plain.state_dict(), path)
    rule = dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=2, num_experts=3)
    model = build(pretrained=str(path), expand=[rule])
    assert model.load_report.skipped and all(k.startswith('head.') for k in model.load_report.skipped)
    expert = model.backbone.blocks[1].mlp.fc1.weight
    assert expert.shape[0] == 3
    assert all(torch.equal(w, plain.backbone.blocks[1].mlp.fc1.weight) for w in expert)
    model.eval(), plain.eval()
    torch.testing.assert_close(model.extract(points), plain.extract(points))
    assert [row.status for row in model.expand_report] == ['expanded']
    # the same plain weights load into the expanded model
    target = build(head=dict(type='ClsHead', num_classes=8, hidden=16), expand=[rule]).eval()
    load_plain(target, plain.state_dict())
    torch.testing.assert_close(target(points), plain(points))


def test_load_plain_reports(points):
    source, model = build().state_dict(), build()
    report = load_plain(model, {f'module.{k}': v for k, v in source.items()})
    assert report.layout == 'ewa3d' and report.matched == list(source)
    assert not (report.missing or report.unexpected or report.skipped)
    assert all(torch.equal(source[k], v) for k, v in model.state_dict().items())
    source['backbone.extra'] = source.pop('backbone.norm.weight')
    with pytest.raises(ValueError, match=r'not in the checkpoint: backbone\.norm\.weight.*backbone\.extra'):
        load_plain(model, dict(state_dict=source))
    report = load_plain(model, dict(state_dict=source), strict=False)
    assert report.missing == ['backbone.norm.weight'] and report.unexpected == ['backbone.extra']
    assert 'backbone.extra' in str(report)


def test_load_plain_another_number_of_classes():
    source = build(head=dict(type='ClsHead', num_classes=8, hidden=16)).state_dict()
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'\(8,\).*\(5,\).*skip_head'):
        load_plain(model, source)
    report = load_plain(model, source, skip_head=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key.startswith('head.') else source)[key])
    assert set(report.skipped) == {k for k in source if k.startswith('head.')}


def test_load_plain_of_another_model_changes_nothing():
    model = build()
    before = copy.deepcopy(model.state_dict())
    wider = build(backbone=backbone_cfg(embed_dim=48)).state_dict()
    for source, message in ((nn.Linear(3, 4).state_dict(), r'another model.*backbone\.cls_token.*found weight'),
                            (wider, 'other shapes'), ({'epoch': 3}, 'no tensors.*epoch'),
                            ({'backbone.norm.weight': torch.ones(24)}, 'another model')):
        for strict in (True, False):
            with pytest.raises(ValueError, match=message):
                load_plain(model, source, strict=strict, skip_head=True)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r'nothing\.pth'):
        load_plain(model, 'nothing.pth')


@pytest.mark.parametrize('strict', [True, False])
def test_load_plain_of_an_expanded_model_names_the_way_out(strict):
    expanded = build(expand=[dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=3)])
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'expanded.*blocks\.0\.mlp\.fc1\.weight is \(3, .*tools/fuse\.py'):
        load_plain(model, expanded.state_dict(), strict=strict)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    ewa3d.fuse(expanded)
    load_plain(model, expanded.state_dict())


def test_rename_both_ways():
    state = build().state_dict()
    theirs = rename(state, 'point_mae', reverse=True)
    assert theirs['encoder.second_conv.0.weight'].shape == (16, 24, 1)
    assert {'cls_token', 'blocks.blocks.2.mlp.fc1.weight', 'cls_head_finetune.8.bias'} <= set(theirs)
    back = rename(theirs, 'point_mae')
    assert set(back) == set(state)
    model = build()
    assert load_plain(model, theirs).layout == 'point_mae'
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    with pytest.raises(KeyError, match='point_mae'):
        rename(state, 'point_ma')


def test_encoder_is_usable_alone(points):
    model = TokenEncoder(dict(TOKENIZER), embed_dim=24, depth=1, num_heads=2)
    F.mse_loss(model(points), torch.zeros(4, 7, 24)).backward()
    assert all(p.grad is not None for p in model.parameters())
