"""Official files to ours and back: the same tensors, what is told, what is refused."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from official_files import classifier, linear, pretrain, vit
from torch import nn

import ewa3d
from ewa3d import cli
from ewa3d.convert import convert_checkpoint
from ewa3d.engine.checkpoint import load_any, read_checkpoint, write_checkpoint
from ewa3d.engine.runner import Runner
from ewa3d.models.weights import LAYOUTS

REPO = Path(__file__).resolve().parents[1]
FIXTURES = [('point-mae', 'pointmae_cls', 'classifier'), ('point-mae', 'pointmae_partseg', 'part-segmentation'),
            ('point-mae', 'pointmae_pretrain', 'pretrain'),
            ('dvae', 'pointbert_dvae', 'tokenizer'), ('point-bert', 'pointbert_cls', 'classifier'),
            ('point-bert', 'pointbert_partseg', 'part-segmentation'), ('point-bert', 'pointbert_mpm', 'pretrain')]


@pytest.fixture
def files(tmp_path):
    """``files(state)``: a file that holds it as an official one, and the paths of two files to write."""
    def make(state, entry='base_model', **more):
        torch.save({entry: state, **more} if entry else state, tmp_path / 'src.pth')
        return tmp_path / 'src.pth', tmp_path / 'ours.pth', tmp_path / 'back.pth'
    return make


def run(capsys, *argv) -> tuple[int, str]:
    """Exit code and all that was printed."""
    capsys.readouterr()
    code = cli.main(['convert', *map(str, argv)])
    return code, ''.join(capsys.readouterr())


# ---- both ways ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind, name, task', FIXTURES)
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_there_and_back_is_the_same_bit_for_bit(reference, tmp_path, capsys, kind, name, task, suffix):
    source, ours, back = reference(name).path / 'checkpoint.pth', tmp_path / f'x.{suffix}', tmp_path / 'back.pth'
    code, text = run(capsys, kind, source, ours)
    assert code == 0 and f'{kind} {task}' in text and 'missing: nothing' in text and 'unexpected: nothing' in text
    assert f'wrote {ours}' in text and 'encoder_dim=' in text
    meta = read_checkpoint(ours)['meta']['official']
    assert (meta['kind'], meta['task']) == (kind, task) and meta['sizes']['encoder_dim'] in (32, 48)
    code, text = run(capsys, kind, ours, back, '--to-official')
    assert code == 0 and 'missing: nothing' in text
    entry = LAYOUTS[meta['layout']].entry
    official = torch.load(back, weights_only=True)
    assert list(official) == [entry]
    original = {key.removeprefix('module.'): value for key, value in read_checkpoint(source)[entry].items()}
    assert same(official[entry], original)


def test_a_converted_file_is_one_of_ours(files):
    source, ours, _ = files(classifier(classes=4))
    convert_checkpoint('point-mae', source, ours)
    cfg = dict(type='TaskModel', neck=dict(type='TokenPool'), head=dict(type='ClsHead', num_classes=4),
               backbone=dict(type='TokenEncoder', embed_dim=36, depth=2, num_heads=2,
                             tokenizer=dict(type='PointPatchEmbed', num_groups=6, group_size=5, skip_origin=True)))
    points = torch.randn(2, 30, 3)
    official = ewa3d.from_official('point-mae', source, num_heads=2, num_groups=6, group_size=5)
    assert torch.equal(ewa3d.build(cfg, ours)(points), official(points))


@pytest.mark.parametrize('dtype', [torch.float16, torch.float64])
def test_types_are_kept(files, dtype):
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in classifier().items()}
    source, ours, back = files(state, entry=None)
    convert_checkpoint('point-mae', source, ours)
    convert_checkpoint('point-mae', ours, back, to_official=True)
    assert same(read_checkpoint(back)['base_model'], state)


@pytest.mark.parametrize('entry', ['base_model', 'model_state_dict', 'model', 'state_dict', None])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_every_nesting(files, entry, prefix):
    state = classifier(width=8, depth=1)
    source, ours, _ = files({prefix + key: value for key, value in state.items()}, entry)
    report = convert_checkpoint('point-mae', source, ours)
    assert report.written and len(report.matched) == len(state)


# ---- models that were trained here -----------------------------------------------------------------------------------
SIZES = dict(embed_dim=24, depth=2, num_heads=2)
TOKENIZER = dict(type='PointPatchEmbed', num_groups=6, group_size=5)


def trained(path, num_experts=0, weights=None, head=None, **backbone):
    """A model of ours whose experts differ, and a checkpoint as training writes it."""
    rules = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=num_experts)] if num_experts else None
    cfg = dict(type='TaskModel', neck=dict(type='TokenPool', mode='cls+max'), expand=rules,
               backbone={**dict(type='TokenEncoder', tokenizer=TOKENIZER, **SIZES), **backbone},
               head=dict(type='ClsHead', num_classes=5, **(head or {})))
    model = ewa3d.build(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    parts = {} if weights is None else dict(ema_state_dict={f'module.{k}': v for k, v in weights.items()})
    write_checkpoint(path, model.state_dict(), dict(cfg=dict(model=cfg)), **parts)
    return model


@pytest.mark.parametrize('num_experts', [0, 3])
def test_a_trained_model_goes_to_the_official_code(tmp_path, num_experts):
    model = trained(tmp_path / 'ours.pth', num_experts, tokenizer=dict(TOKENIZER, skip_origin=True))
    report = convert_checkpoint('point-mae', tmp_path / 'ours.pth', tmp_path / 'official.pth', to_official=True)
    assert ('experts averaged: 8 tensors' in str(report)) == bool(num_experts)
    assert 'num_heads=2, num_groups=6, group_size=5' in str(report) and 'skip_origin' not in str(report)
    state = torch.load(tmp_path / 'official.pth', weights_only=True)['base_model']
    assert {key: value.shape for key, value in state.items()} == \
        {key: value.shape for key, value in classifier(24, 2, 5).items()}
    back = ewa3d.from_official('point-mae', tmp_path / 'official.pth', num_heads=2, num_groups=6, group_size=5)
    points = torch.randn(2, 30, 3)
    torch.testing.assert_close(back(points), model(points), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('kind, head, source', [
    ('point-mae', dict(type='MaskedAutoencoder', decoder_depth=2, decoder_num_heads=3), pretrain(24, 2, 2, 8)),
    ('point-bert', dict(type='MaskedTokenModel', cls_dim=8, queue_size=6, dvae=dict(
        type='DiscreteVAE', num_tokens=16, encoder_dim=24)), None)])
def test_pretraining_with_experts_goes_to_the_official_code(tmp_path, kind, head, source):
    tokenizer = dict(type='PointPatchEmbed', num_groups=6, group_size=8, skip_origin=True)
    if kind == 'point-bert':
        tokenizer['encoder_dim'] = 24
    at = 'decoder' if kind == 'point-mae' else 'backbone'
    model = ewa3d.build(dict(head, backbone=dict(type='TokenEncoder', tokenizer=tokenizer, **SIZES),
                             expand=[dict(type='EWAFFN', at=f'{at}.blocks.*.mlp', num_experts=2)])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_checkpoint(tmp_path / 'ours.pth', model.state_dict())
    report = convert_checkpoint(kind, tmp_path / 'ours.pth', tmp_path / 'official.pth', to_official=True)
    assert report.written and 'experts averaged: 8 tensors' in str(report)
    state = torch.load(tmp_path / 'official.pth', weights_only=True)['base_model']
    if source:
        assert {key: value.shape for key, value in state.items()} == {k: v.shape for k, v in source.items()}
    back = ewa3d.from_official(kind, tmp_path / 'official.pth', num_heads=2, num_groups=6,
                               **dict(decoder_num_heads=3) if source else {})
    points, mask = torch.randn(2, 30, 3), torch.tensor([[True, True, True, False, False, False]] * 2)
    draws = {} if source else dict(mask_mixed=mask, mask_k=mask, mixup_ratio=torch.rand(2),
                                   mixup_uniform=torch.rand(2, 6))
    with torch.no_grad():
        wanted, found = (net(points, mask=mask, **draws) for net in (model, back))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)


def test_raw_and_averaged_weights(tmp_path, capsys):
    raw = trained(tmp_path / 'raw.pth').state_dict()
    averaged = trained(tmp_path / 'ours.pth', weights=raw).state_dict()
    for choice, state in (('default', averaged), ('ema', averaged), ('raw', raw)):
        code, text = run(capsys, 'point-mae', tmp_path / 'ours.pth', tmp_path / 'o.pth', '--to-official', '--weights',
                         choice)
        assert code == 0 and f'weights: {"raw" if choice == "raw" else "ema"}' in text
        official = torch.load(tmp_path / 'o.pth', weights_only=True)['base_model']
        assert torch.equal(official['norm.weight'], state['backbone.norm.weight'])
    code, text = run(capsys, 'point-mae', tmp_path / 'raw.pth', tmp_path / 'o.pth', '--to-official', '--weights', 'ema')
    assert code == 2 and 'raw weights only' in text


@pytest.mark.parametrize('options, message', [
    (dict(head=dict(form='linear')), "the head form 'mlp', this model 'linear'"),
    (dict(head=dict(form='mlp_nobn')), "the head form 'mlp', this model 'mlp_nobn'"),
    (dict(pos='first'), "trained with backbone.pos='first'"), (dict(norm_eps=1e-6), 'backbone.norm_eps=1e-06')])
def test_what_the_official_code_cannot_compute_is_refused(tmp_path, capsys, options, message):
    trained(tmp_path / 'ours.pth', **options)
    code, text = run(capsys, 'point-mae', tmp_path / 'ours.pth', tmp_path / 'o.pth', '--to-official')
    assert code == 1 and message in text and not (tmp_path / 'o.pth').exists()


def test_what_the_official_code_has_to_be_told(tmp_path, capsys):
    trained(tmp_path / 'ours.pth', tokenizer=dict(TOKENIZER, widths=(8, 12, 16)))
    code, text = run(capsys, 'point-mae', tmp_path / 'ours.pth', tmp_path / 'o.pth', '--to-official')
    assert code == 0 and 'have to be changed there: widths=(8, 12, 16)' in text and 'skip_origin=False' in text


def test_only_what_the_official_model_has(tmp_path, capsys):
    model = trained(tmp_path / 'x.pth')
    state = dict(model.state_dict(), more=torch.ones(1))
    del state['backbone.norm.bias']
    write_checkpoint(tmp_path / 'ours.pth', state)
    code, text = run(capsys, 'point-mae', tmp_path / 'ours.pth', tmp_path / 'o.pth', '--to-official')
    assert code == 1 and 'missing: backbone.norm.bias' in text and 'unexpected: more' in text
    assert 'loads strictly' in text and not (tmp_path / 'o.pth').exists()


# ---- what is told, what is refused -----------------------------------------------------------------------------------
def test_missing_and_unexpected_tensors_are_told(files, capsys):
    state = dict(classifier(), extra=torch.ones(1))
    del state['norm.bias']
    source, ours, _ = files(state)
    code, text = run(capsys, 'point-mae', source, ours)
    assert code == 0 and 'missing: backbone.norm.bias' in text and 'unexpected: extra' in text
    assert not {'extra', 'backbone.norm.bias'} & read_checkpoint(ours)['state_dict'].keys()


@pytest.mark.parametrize('kind, state', [
    ('point-mae', classifier(encoder=8)), ('point-bert', classifier()), ('point-bert', pretrain()),
    ('dvae', classifier()), ('point-mae', nn.Linear(2, 2).state_dict()),
    ('point-mae', {**pretrain(), **vit('transformer_q.', 8, 1), **linear('transformer_q.lm_head', 8, 4)})])
def test_another_model_is_refused(files, capsys, kind, state):
    source, ours, _ = files(state)
    code, text = run(capsys, kind, source, ours)
    assert code == 1 and f'not the official weights of {kind}' in text and 'Expected keys' in text and 'found' in text
    assert f'refused to write {ours}' in text and not ours.exists()


def test_files_that_are_there_already(tmp_path, files, capsys):
    source, ours, back = files(classifier())
    code, text = run(capsys, 'point-mae', source, back, '--to-official')
    assert code == 1 and 'point-mae classifier weights with official names already' in text
    assert run(capsys, 'point-mae', source, ours)[0] == 0
    code, text = run(capsys, 'point-mae', ours, back)
    assert code == 1 and 'weights with the names of ewa3d' in text
    code, text = run(capsys, 'point-bert', ours, back, '--to-official')
    assert code == 1 and 'no model of ewa3d that has an official counterpart of this kind' in text
    assert not back.exists()


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def test_bad_files_are_one_line(tmp_path, files, capsys):
    source, ours, _ = files(classifier())
    whole = source.read_bytes()

    def fails(*argv) -> str:
        code, text = run(capsys, *argv)
        assert code == 2 and text.startswith('error: ') and text.count('\n') == 1
        assert not ours.exists()
        return text

    assert 'does not exist' in fails('point-mae', tmp_path / 'nowhere.pth', ours)
    assert 'must end in .pth or .safetensors' in fails('point-mae', source, tmp_path / 'x.txt')
    assert 'must end in .pth,' in fails('point-mae', source, tmp_path / 'x.safetensors', '--to-official')
    assert 'is the checkpoint itself' in fails('point-mae', source, source)
    (tmp_path / 'folder.pth').mkdir()
    assert 'is a folder' in fails('point-mae', source, tmp_path / 'folder.pth')
    files(dict(classifier(), **{'norm.bias': torch.ones(3)}))
    assert 'do not fit each other: backbone.norm.bias is (3,) instead of (36,)' in fails('point-mae', source, ours)
    for content in (b'', whole[:-900], whole[:99], b'text' * 99):
        source.write_bytes(content)
        assert 'src.pth' in fails('point-mae', source, ours)
    files(classifier(), metrics=Evil(tmp_path / 'marker'))
    assert 'Nothing in it was run' in fails('point-mae', source, ours)
    assert not (tmp_path / 'marker').exists()


def test_unknown_kinds(files, capsys):
    source, ours, _ = files(classifier())
    with pytest.raises(ValueError, match="did you mean 'point-mae'"):
        convert_checkpoint('point_mae', source, ours)
    with pytest.raises(SystemExit):
        cli.main(['convert', 'point-mea', str(source), str(ours)])
    assert 'point-mae' in capsys.readouterr().err


def test_the_script(files):
    source, ours, _ = files(classifier(width=8, depth=1))
    command = [sys.executable, str(REPO / 'tools' / 'convert_weights.py'), 'point-mae', str(source), str(ours)]
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=str(REPO), OMP_NUM_THREADS='1'), text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0 and 'wrote' in done.stdout, done.stderr
    assert len(read_checkpoint(ours)['state_dict']) == len(classifier(width=8, depth=1))


# ---- load_from ------------------------------------------------------------------------------------------------------
def toy(tmp_path, **options):
    cfg = toy_config(tmp_path / 'run', epochs=1, **options)
    cfg['model']['backbone'].update(embed_dim=24, num_heads=2)
    cfg['model']['backbone']['tokenizer'].update(embed_dim=24)
    return cfg


@pytest.mark.parametrize('ewa', [False, True])
def test_load_from_takes_official_files(tmp_path, files, ewa):
    whole = classifier(24, 2, 3, widths=(8, 8, 16), pos=128)
    cfg = toy(tmp_path, ewa=ewa, load_from=str(files(whole)[0]))
    cfg['model']['head'] = dict(type='ClsHead')
    cfg['model']['backbone']['tokenizer']['pos_dim'] = 128
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    state = runner.model.state_dict()
    assert torch.equal(state['head.layers.8.weight'], whole['cls_head_finetune.8.weight'])
    fc1 = state['backbone.blocks.0.mlp.fc1.weight']
    assert torch.equal(fc1[0] if ewa else fc1, whole['blocks.blocks.0.mlp.fc1.weight'])


def test_load_from_takes_a_pretrained_backbone(tmp_path, files):
    state = pretrain(24, 2)
    cfg = toy(tmp_path, load_from=str(files(state)[0]))
    cfg['model']['backbone']['tokenizer'].update(pos_dim=128, widths=(128, 256, 512))
    runner = Runner.from_cfg(cfg)
    before = {key: value.clone() for key, value in runner.model.state_dict().items() if key.startswith('head.')}
    runner.load_or_resume()
    after = runner.model.state_dict()
    assert torch.equal(after['backbone.norm.weight'], state['MAE_encoder.norm.weight'])
    assert all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(ValueError, match='does not fit the model'):  # to evaluate it, all has to be there
        ewa3d.build(cfg['model'], tmp_path / 'src.pth', num_classes=3)


def test_our_own_pretraining_continues_in_a_task_model(tmp_path):
    """With the experts that it was trained with; what no task model has is left out."""
    rules = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)]
    model = trained(tmp_path / 'x.pth', 2)
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(('head.', 'backbone.cls_'))}
    pretrained = dict(format_version=1), dict(state, mask_token=torch.ones(1, 1, 24), **{'decoder.x': torch.ones(1)})
    target = ewa3d.build(dict(type='TaskModel', neck=dict(type='TokenPool'), expand=rules,
                              backbone=dict(type='TokenEncoder', tokenizer=TOKENIZER, **SIZES),
                              head=dict(type='ClsHead', num_classes=9)))
    with pytest.raises(ValueError, match='does not fit the model'):
        load_any(target, *pretrained)
    load_any(target, *pretrained, transfer=True)
    after = target.state_dict()
    assert all(torch.equal(after[key], value) for key, value in state.items())
