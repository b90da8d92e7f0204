"""Models around official checkpoints: sizes from the weights, the published numbers, errors for every other file."""
import os
import sys
import types

import pytest
import torch
from official_files import blocks, classifier, dvae, linear, logits, pretrain, vit
from torch import nn

import ewa3d
from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
from ewa3d.models.backbone import TokenEncoder
from ewa3d.models.official import KINDS, WrongModelError
from ewa3d.models.weights import LAYOUTS, layouts_of, load_plain, rename, squeezed

TOLERANCE = dict(atol=3e-5, rtol=3e-5)
SMALL = dict(num_heads=2, num_groups=6, group_size=5)


def save(path, state, entry='base_model', prefix='', **more):
    state = {prefix + key: value for key, value in state.items()}
    torch.save({entry: state, **more} if entry else state, path)
    return path


@pytest.fixture
def official(tmp_path):
    """``official(state)``: a file that holds it as the projects' do."""
    return lambda state, **options: save(tmp_path / 'ckpt.pth', state, **options)


# ---- the published numbers -------------------------------------------------------------------------------------------
@pytest.mark.parametrize('name, kind', [('pointmae_cls', 'point-mae'), ('pointbert_cls', 'point-bert')])
def test_classifier_fixtures(reference, name, kind):
    ref = reference(name)
    model = ewa3d.from_official(kind, ref.path / 'checkpoint.pth', num_heads=3, num_groups=16, group_size=8)
    points, expected = ref.inputs['points'], ref.expected
    assert not model.training and isinstance(model.backbone, TokenEncoder)
    torch.testing.assert_close(model(dict(points=points)), expected['logits'], **TOLERANCE)
    torch.testing.assert_close(model.extract(points), expected['feature'], **TOLERANCE)
    tokens = model.backbone.tokenize(dict(points=points))
    torch.testing.assert_close(tokens.coord, expected['center'], atol=1e-6, rtol=0)
    stages = model.backbone.encode(tokens.x, tokens.pos, out_indices=range(3), norm=False)
    for i, x in enumerate(stages):
        torch.testing.assert_close(x, expected[f'block_{i}'], **TOLERANCE)
    ewa3d.expand(model, [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)])
    torch.testing.assert_close(model(points), expected['logits'], **TOLERANCE)


def test_dvae_fixture(reference):
    ref = reference('pointbert_dvae')
    model = ewa3d.from_official('dvae', ref.path / 'checkpoint.pth', num_groups=16,
                                temperature=float(ref.inputs['temperature']))
    assert not model.training and (model.num_tokens, model.group_size) == (64, 8)
    with torch.no_grad():
        found = model(dict(points=ref.inputs['points']), noise=ref.inputs['gumbel_noise'])
    for name, value in ref.expected.items():
        if name == 'neighborhood':
            continue  # in any order
        torch.testing.assert_close(found[name], value, **TOLERANCE, msg=lambda text, name=name: f'{name}: {text}')
    same = ewa3d.from_official('point-bert', ref.path / 'checkpoint.pth', num_groups=16)  # the project has it too
    assert torch.equal(same(ref.inputs['points'])['logits'], found['logits'])


def test_point_mae_pretraining_fixture(reference):
    ref = reference('pointmae_pretrain')
    path, points, mask = ref.path / 'checkpoint.pth', ref.inputs['points'], ref.inputs['mask']
    model = ewa3d.from_official('point-mae', path, num_heads=3, num_groups=16)
    assert not model.training and model.backbone.tokenizer.group_size == 8
    with torch.no_grad():
        found = model(dict(points=points), mode='tensor', mask=mask)
    for name, value in ref.expected.items():
        if '/' not in name and name not in ('neighborhood', 'target_points'):  # points of a patch in any order
            torch.testing.assert_close(found[name], value, **TOLERANCE, msg=lambda text, name=name: f'{name}: {text}')
    with pytest.raises(ValueError, match='decoder_num_heads=5 does not divide'):
        ewa3d.from_official('point-mae', path, num_heads=3, decoder_num_heads=5)
    with pytest.raises(ValueError, match='group_size=32 was given, and the weights have group_size=8'):
        ewa3d.from_official('point-mae', path, num_heads=3, group_size=32)
    ewa3d.expand(model, [dict(type='EWAFFN', at=f'{part}.blocks.*.mlp', num_experts=2) for part in
                         ('backbone', 'decoder')])
    with torch.no_grad():
        torch.testing.assert_close(model(points, mask=mask)['reconstructed_points'], found['reconstructed_points'],
                                   **TOLERANCE)


def test_point_bert_pretraining_fixture(reference):
    ref = reference('pointbert_mpm')
    model = ewa3d.from_official('point-bert', ref.path / 'checkpoint.pth', num_heads=3, num_groups=16, m=0.9)
    assert not model.training and model.key_momentum == 0.9 and model.queue.shape == (24, 32)
    draws = {name: ref.inputs[name] for name in ('mask_mixed', 'mask_k', 'mixup_ratio', 'mixup_uniform')}
    with torch.no_grad():
        found = model(dict(points=ref.inputs['points']), mask=ref.inputs['mask_q'], **draws)
    for name, value in ref.expected.items():
        if name in found:
            torch.testing.assert_close(found[name], value, **TOLERANCE, msg=lambda text, name=name: f'{name}: {text}')
    assert {name for name in ref.expected if '/' not in name} <= found.keys()
    with pytest.raises(ValueError, match='group_size=32 was given, and the weights have group_size=8'):
        ewa3d.from_official('point-bert', ref.path / 'checkpoint.pth', num_heads=3, group_size=32)


# ---- sizes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind, sizes', [
    ('point-mae', dict(width=36, depth=2, classes=7)), ('point-mae', dict(width=20, depth=1, classes=40, hidden=50)),
    ('point-mae', dict(width=24, depth=3, classes=2, widths=(8, 12, 20), pos=10)),
    ('point-bert', dict(width=36, depth=2, classes=7, encoder=20)),
    ('point-bert', dict(width=16, depth=4, classes=15, encoder=16))])
def test_sizes_come_from_the_weights(official, kind, sizes):
    state = classifier(**sizes)
    model = ewa3d.from_official(kind, official(state, prefix='module.'), **SMALL)
    assert model.backbone.embed_dim == sizes['width'] and len(model.backbone.blocks) == sizes['depth']
    assert model.head.num_classes == sizes['classes'] and model.backbone.tokenizer.skip_origin
    assert model.load_report.layout == kind.replace('-', '_')
    points = torch.randn(3, 40, 3)
    center, patches = model.backbone.tokenizer.group(points)
    assert center.shape == (3, 6, 3) and patches.shape == (3, 6, 5, 3)
    torch.testing.assert_close(model(dict(points=points)), logits(state, center, patches, heads=2), **TOLERANCE)


def test_safetensors_with_official_names(tmp_path):
    state = classifier()
    write_checkpoint(tmp_path / 'x.safetensors', state)
    model = ewa3d.from_official('point-mae', tmp_path / 'x.safetensors', **SMALL)
    assert torch.equal(model.backbone.norm.weight, state['norm.weight'])


def test_points_are_taken_as_given(official):
    model = ewa3d.from_official('point-mae', official(classifier()), **SMALL)
    points = torch.randn(2, 40, 3)
    assert not torch.allclose(model(points), model(points * 3 + 1))


def test_official_defaults(official):
    tokenizer = ewa3d.from_official('point-mae', official(classifier())).backbone.tokenizer
    assert (tokenizer.num_groups, tokenizer.group_size) == (64, 32)
    model = ewa3d.from_official('point-bert', official(classifier(encoder=8)))
    assert model.backbone.blocks[0].attn.num_heads == 6


@pytest.mark.parametrize('ratio', [0.5, 1, 3.7, 49 / 50])
def test_hidden_widths_that_are_no_round_multiple(official, ratio):
    hidden = round(50 * ratio)
    model = ewa3d.from_official('point-mae', official(classifier(width=50, hidden=hidden)), num_heads=5)
    assert model.backbone.blocks[0].mlp.fc1.out_features == hidden


def test_given_sizes_are_checked(official):
    path = official(classifier(width=36))
    with pytest.raises(ValueError, match=r'ckpt\.pth: num_heads=5 does not divide .* 36; give the num_heads'):
        ewa3d.from_official('point-mae', path, num_heads=5)
    with pytest.raises(ValueError, match=r'depth=12 was given, and the weights have depth=2'):
        ewa3d.from_official('point-mae', path, depth=12)
    assert ewa3d.from_official('point-mae', path, depth=2, widths=[128, 256, 512]).head.num_classes == 7
    with pytest.raises(TypeError, match=r"no size 'num_grups'; did you mean 'num_groups'"):
        ewa3d.from_official('point-mae', path, num_grups=16)
    with pytest.raises(TypeError, match=r"no size 'zzz'; valid names: .*group_size.*num_heads"):
        ewa3d.from_official('point-mae', path, zzz=1)
    for sizes in (dict(num_heads='many'), dict(num_heads=2.), dict(group_size='x')):
        with pytest.raises(TypeError, match=r'ckpt\.pth: .*must be an integer'):
            ewa3d.from_official('point-mae', path, **sizes)
    for sizes in (dict(num_heads=0), dict(num_groups=0)):
        with pytest.raises(ValueError, match=r'ckpt\.pth: .*must be at least 1'):
            ewa3d.from_official('point-mae', path, **sizes)


def test_point_mae_pretraining_of_other_sizes(official):
    model = ewa3d.from_official('point-mae', official(pretrain(20, 3, 2, group_size=7)), num_heads=4, num_groups=9,
                                decoder_num_heads=2, mask_ratio=0.4, mask_type='block')
    assert (len(model.backbone.blocks), len(model.decoder.blocks), model.group_size) == (3, 2, 7)
    assert model.backbone.blocks[0].attn.num_heads == 4 and model.decoder.blocks[1].attn.num_heads == 2
    assert model(torch.randn(2, 40, 3))['reconstructed_points'].shape == (2, 3, 7, 3)
    with pytest.raises(ValueError, match=r"'increase_dim\.0\.weight' gives 10 numbers, which are no points"):
        ewa3d.from_official('point-mae', official({**pretrain(), **linear('increase_dim.0', 36, 10, 1)}))


def test_dvae_of_other_sizes(official):
    torch.manual_seed(5)
    state = dvae(group_size=12, encoder=20, tokens=24, token=16, decoder=8)
    path = official(state, prefix='module.')
    model = ewa3d.from_official('dvae', path, num_groups=6)
    assert (model.group_size, model.num_tokens, model.codebook.shape[1]) == (12, 24, 16)
    assert model(torch.randn(2, 40, 3))['fine'].shape == (2, 6, 12, 3)
    with pytest.raises(ValueError, match='group_size=32 was given, and the weights have group_size=12'):
        ewa3d.from_official('dvae', path, group_size=32)
    with pytest.raises(TypeError, match=r"no size 'num_heads'.*num_groups"):
        ewa3d.from_official('dvae', path, num_heads=6)
    with pytest.raises(ValueError, match=r"'decoder\.mlp\.4\.weight' gives 10 numbers"):
        ewa3d.from_official('dvae', official({**state, 'decoder.mlp.4.weight': torch.ones(10, 1024)}))


def test_the_names_of_official_configs_will_do(official):
    model = ewa3d.from_official('point-mae', official(classifier(width=36)), trans_dim=36, cls_dim=7, num_group=5)
    assert model.backbone.tokenizer.num_groups == 5
    with pytest.raises(ValueError, match='num_classes=8 was given, and the weights have num_classes=7'):
        ewa3d.from_official('point-mae', official(classifier(width=36)), cls_dim=8)


# ---- files that are something else -----------------------------------------------------------------------------------
def test_unknown_kinds(official):
    with pytest.raises(ValueError, match=r"'pointmae' is no kind.*did you mean 'point-mae'"):
        ewa3d.from_official('pointmae', official(classifier()))
    with pytest.raises(ValueError, match='valid names: 3detr, dvae, point-bert, point-mae'):
        ewa3d.from_official('xyz', 'not read')


@pytest.mark.parametrize('kind', list(KINDS))
def test_another_model_is_refused(official, kind):
    others = {'point-mae': classifier(encoder=8), 'point-bert': classifier(), 'dvae': pretrain(),
              '3detr': classifier()}
    with pytest.raises(WrongModelError, match=rf'ckpt\.pth holds .* weights, not .* of {kind}\. Expected keys .*found'):
        ewa3d.from_official(kind, official(others[kind]))
    both = {**pretrain(), **vit('transformer_q.', 8, 1), **linear('transformer_q.lm_head', 8, 4)}
    with pytest.raises(WrongModelError, match='point-mae pretrain weights and point-bert pretrain weights'):
        ewa3d.from_official(kind, official(both))
    for state in (nn.Linear(3, 3).state_dict(), vit('', 8, 1), blocks('decoder.blocks', 8, 1)):
        with pytest.raises(WrongModelError, match='unknown weights'):
            ewa3d.from_official(kind, official(state))


def test_our_own_weights_are_recognised(official):
    ours = rename(classifier(), 'point_mae')
    with pytest.raises(WrongModelError, match='weights with the names of ewa3d'):
        ewa3d.from_official('point-mae', official(ours, entry='state_dict'))


@pytest.mark.parametrize('change, message', [
    ({'norm.weight': None}, r"lacks 'norm\.weight'"),
    ({'norm.bias': None}, r'not in the checkpoint: backbone\.norm\.bias'),
    ({'extra': torch.ones(1)}, 'not in the model: extra'),
    ({'norm.weight': torch.tensor(1.)}, r"'norm\.weight' has the shape \(\)"),
    ({'norm.weight': torch.ones(0)}, r"'norm\.weight' has the shape \(0,\), which tells no size"),
    ({'pos_embed.2.weight': torch.ones(35, 128)}, r'other shapes.*pos_embed\.2\.weight'),
    ({'cls_head_finetune.8.weight': torch.ones(7, 255)}, r'head\.layers\.8\.weight is \(7, 255\)'),
    ({'blocks.blocks.5.norm1.weight': torch.ones(36)}, r"were expected at 'blocks\.blocks\.', found 0, 1, 5"),
    ({'cls_head_finetune.3.weight': torch.ones(36)}, r'a head with the layers .*found \(0, 1, 3, 4, 5, 8\)'),
    ({'encoder.first_conv.0.weight': None}, r"lacks 'encoder\.first_conv\.0\.weight'")])
def test_tensors_that_do_not_fit(official, change, message):
    state = {key: value for key, value in {**classifier(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=rf'ckpt\.pth.*{message}'):
        ewa3d.from_official('point-mae', official(state))


def test_damaged_and_hostile_files(tmp_path, official):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "marker"}',)

    path = official(classifier(), metrics=Evil())
    with pytest.raises(ValueError, match=r'ckpt\.pth was refused: .*system.*Nothing in it was run'):
        ewa3d.from_official('point-mae', path)
    assert not (tmp_path / 'marker').exists()
    whole = official(classifier()).read_bytes()
    for content, message in ((b'', 'is empty'), (whole[:-900], 'cannot be read'), (b'text' * 99, 'ckpt')):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            ewa3d.from_official('point-mae', path)
    for content, message in ((dict(base_model={}), 'nothing'), (dict(epoch=3, lr=0.1), 'epoch, lr')):
        torch.save(content, path)
        with pytest.raises(ValueError, match=f'holds no tensors; found the keys {message}'):
            ewa3d.from_official('point-mae', path)
    torch.save(dict(base_model={**classifier(), 3: torch.ones(1)}), path)
    with pytest.raises(ValueError, match=r'has the key 3 among its weights; names \(strings\) were expected'):
        ewa3d.from_official('point-mae', path)
    with pytest.raises(FileNotFoundError, match='nowhere'):
        ewa3d.from_official('point-mae', tmp_path / 'nowhere.pth')


@pytest.fixture
def stored_class(monkeypatch):
    """``stored_class('tools.runner_finetune', 'Acc_Metric')``: a class that pickles under this name."""
    def make(module, name):
        class Metric:
            def __setstate__(self, state):
                raise AssertionError('the class of the file was used')
        Metric.__module__, Metric.__qualname__, Metric.__name__ = module, name, name
        monkeypatch.setitem(sys.modules, 'tools', types.ModuleType('tools'))
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        setattr(sys.modules[module], name, Metric)
        return Metric
    return make


@pytest.mark.parametrize('legacy', [False, True])
def test_old_files_hold_a_metrics_object(official, tmp_path, stored_class, legacy):
    metric = stored_class('tools.runner_finetune', 'Acc_Metric')()
    metric.acc = torch.tensor(91.5)
    path = tmp_path / 'ckpt.pth'
    torch.save(dict(base_model=classifier(), metrics=metric, best_metrics=metric), path,
               _use_new_zipfile_serialization=not legacy)
    assert read_checkpoint(path)['metrics'].acc == 91.5
    assert ewa3d.from_official('point-mae', path).head.num_classes == 7


def test_other_classes_are_refused(official, stored_class):
    metric = stored_class('tools.runner_finetune', 'Another')()
    with pytest.raises(ValueError, match=r"'tools\.runner_finetune\.Another', which is not on the list"):
        ewa3d.from_official('point-mae', official(classifier(), metrics=metric))


# ---- tables ---------------------------------------------------------------------------------------------------------
FILES = {'point_mae': 'pointmae_cls', 'point_mae_pretrain': 'pointmae_pretrain', 'point_bert': 'pointbert_cls',
         'point_mae_partseg': 'pointmae_partseg', 'point_bert_partseg': 'pointbert_partseg',
         'point_bert_pretrain': 'pointbert_mpm', 'dvae': 'pointbert_dvae', '3detr': 'threedetr_m_sunrgbd'}


def test_layouts_without_a_file_are_tested_elsewhere():
    assert set(LAYOUTS) - set(FILES) == {'repavit', 's4d', 'zeroi2v'}  # test_repa.py, test_parity_s4d.py, …


@pytest.mark.parametrize('layout', list(FILES))
def test_renaming_loses_nothing(layout, reference):
    content = read_checkpoint(reference(FILES[layout]).path / 'checkpoint.pth')
    state = {key.removeprefix('module.'): value for key, value in content[LAYOUTS[layout].entry].items()}
    assert layouts_of(state) == [layout]
    ours = rename(state, layout)
    assert len(ours) == len(state) and layout in layouts_of(ours, reverse=True)
    flat = {key: value.flatten(1) if key.endswith('.weight') and value.ndim > 2 else value
            for key, value in ours.items()}
    theirs = rename(squeezed(ours, flat), layout, reverse=True)
    assert theirs.keys() == state.keys()
    for key, value in state.items():
        assert theirs[key].shape == value.shape and torch.equal(theirs[key], value)


def test_squeezed():
    own = dict(a=torch.ones(3, 2), b=torch.ones(3), c=torch.ones(3, 2, 1))
    state = dict(a=torch.ones(3, 2, 1, 1), b=torch.ones(3), c=torch.ones(3, 2, 1), d=torch.ones(3, 2, 1))
    assert {key: tuple(value.shape) for key, value in squeezed(state, own).items()} == \
        dict(a=(3, 2), b=(3,), c=(3, 2, 1), d=(3, 2, 1))
    assert squeezed(dict(a=torch.ones(3, 2, 4)), own)['a'].shape == (3, 2, 4)


# ---- into models of one's own ----------------------------------------------------------------------------------------
def config(**options):
    return {**dict(type='TaskModel', neck=dict(type='TokenPool'), head=dict(type='ClsHead', num_classes=4),
                   backbone=dict(type='TokenEncoder', embed_dim=36, depth=2, num_heads=2,
                                 tokenizer=dict(type='PointPatchEmbed', num_groups=6, group_size=5))), **options}


def bert_config(**options):
    cfg = config(**options)
    cfg['backbone']['tokenizer']['encoder_dim'] = 20
    return cfg


def bert_pretrain(width=36, depth=2, codes=64):
    state = {'queue': torch.randn(16, 10), 'queue_ptr': torch.tensor([3]),
             **dvae('dvae.', encoder=20, tokens=codes, group_size=12)}
    for name in ('transformer_q.', 'transformer_k.'):
        state.update({**vit(name, width, depth, 20), f'{name}mask_token': torch.randn(1, 1, width),
                      **linear(f'{name}lm_head', width, 64), **linear(f'{name}cls_head.0', width, 16),
                      **linear(f'{name}cls_head.2', 16, 16)})
    return state


def test_pretrained_before_expanding(official):
    state = pretrain()
    rules = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=3)]
    model = ewa3d.build(config(pretrained=str(official(state)), expand=rules))
    stacked, plain = model.backbone.blocks[1].mlp.fc1.weight, state['MAE_encoder.blocks.blocks.1.mlp.fc1.weight']
    assert stacked.shape == (3, *plain.shape) and all(torch.equal(w, plain) for w in stacked)
    assert {key.split('.')[0] for key in model.load_report.skipped} == {'mask_token', 'decoder_pos_embed', 'decoder',
                                                                        'increase_dim'}


def test_point_bert_pretraining_goes_into_a_classifier(official):
    state = bert_pretrain()
    model = ewa3d.build(bert_config(pretrained=str(official(state))))
    report = model.load_report
    assert report.layout == 'point_bert_pretrain' and not report.unexpected
    assert all(key.startswith('head.') for key in report.missing)
    assert torch.equal(model.backbone.cls_token, state['transformer_q.cls_token'])
    assert torch.equal(model.backbone.tokenizer.reduce_dim.weight, state['transformer_q.reduce_dim.weight'])


def test_a_dvae_of_another_vocabulary_than_the_labels(official):
    with pytest.raises(ValueError, match='the lm_head tells 64 codes apart, and the dvae has 32'):
        ewa3d.from_official('point-bert', official(bert_pretrain(codes=32)))
    model = ewa3d.from_official('point-bert', official(bert_pretrain(width=30)), num_heads=5)
    assert model.cls_head[0].out_features == 16 and model.backbone.tokenizer.group_size == 12
    assert model.mask_ratio == (0.25, 0.45) and model.key_momentum == 0.999


def test_a_head_of_another_form_is_left_alone_as_a_whole(official):
    """Both heads begin with a layer of the same shape."""
    cfg = bert_config(pretrained=str(official(classifier(encoder=20, classes=4))))
    model = ewa3d.build(cfg)
    assert set(model.load_report.skipped) >= {'head.layers.0.weight', 'head.layers.8.weight', 'head.layers.3.bias'}
    assert not model.load_report.missing and not model.load_report.unexpected


@pytest.mark.parametrize('make, state', [(config, pretrain()), (bert_config, bert_pretrain())])
def test_transfer_is_strict_about_the_backbone(make, state):
    model = ewa3d.build(make())
    report = load_plain(model, state, strict='transfer')
    assert {key.split('.')[0] for key in report.missing} <= {'head', 'backbone'} and report.skipped
    with pytest.raises(ValueError, match=r'does not fit the model: .*not in the checkpoint'):
        load_plain(model, state)
    prefix = 'MAE_encoder.' if 'mask_token' in state else 'transformer_q.'
    with pytest.raises(ValueError, match=r'backbone\.norm\.bias'):
        load_plain(model, {k: v for k, v in state.items() if k != f'{prefix}norm.bias'}, strict='transfer')
    with pytest.raises(ValueError, match=r'backbone\.blocks\.2'):
        load_plain(model, {**state, **blocks(f'{prefix}blocks.blocks', 36, 3)}, strict='transfer')
    whole = squeezed(rename(classifier(classes=4), 'point_mae'), ewa3d.build(config()).state_dict())
    whole.pop('head.layers.0.bias')
    with pytest.raises(ValueError, match=r'head\.layers\.0\.bias'):  # no pretraining model's: strict
        load_plain(ewa3d.build(config()), whole, strict='transfer')
