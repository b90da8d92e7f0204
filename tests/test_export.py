"""Exported models compute what torch does, at other sizes too, and their files say what they are."""
from pathlib import Path

import pytest
import timm
import torch
from cli_toys import fails, trained_folder
from engine_toys import CLASSES, on_cpu  # noqa: F401
from mmengine.config import Config
from test_readme import example
from toys import scramble

import ewa3d
from ewa3d import cli
from ewa3d.config_files import find_config
from ewa3d.engine.checkpoint import write_checkpoint
from ewa3d.export import DTYPES, export_checkpoint, programs, read_metadata
from ewa3d.export import checkpoint as export_module
from ewa3d.fusing import example_inputs
from ewa3d.registry import MODELS

REPO = Path(__file__).resolve().parents[1]
GUIDE = REPO / 'docs' / 'export.md'
GROUPS = dict(type='PointPatchEmbed', num_groups=6, group_size=5, widths=(8, 8, 16), pos_dim=8)
SIZES = dict(embed_dim=16, depth=2, num_heads=2)
PARTS = dict(chair=[3, 0], lamp=[1, 2, 5], mug=[4, 6])
SET = dict(type='SetAbstraction', num_points=24, radius=0.5, num_neighbors=6, widths=(8, 16))
EXPERTS = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)]


def classifier(tokenizer=GROUPS, expand=None, neck=None, **backbone) -> dict:
    return dict(type='TaskModel', backbone=dict(type='TokenEncoder', tokenizer=tokenizer, **SIZES, **backbone),
                neck=neck or dict(type='TokenPool'), head=dict(type='ClsHead', num_classes=3, hidden=8), expand=expand)


def segmenter(neck: str, **options) -> dict:
    neck = dict(type=neck, out_indices=(0, 1, 2), num_categories=3, hidden=16, **options)
    return dict(type='TaskModel', backbone=dict(type='TokenEncoder', tokenizer=GROUPS, **SIZES | dict(depth=3)),
                neck=neck, head=dict(type='PartSegHead', parts=PARTS, hidden=(16, 8)))


def detector(**backbone) -> dict:
    return dict(type='TaskModel', backbone=dict(type='SetEncoder', tokenizer=SET, **SIZES, **backbone),
                neck=dict(type='QueryDecoder', num_queries=7, depth=2, num_heads=2),
                head=dict(type='DETRHead', num_classes=3, num_angle_bins=4))


def of_clips(tokenizer: dict, **backbone) -> dict:
    return dict(type='TaskModel', backbone=dict(type='TokenEncoder', tokenizer=tokenizer, **SIZES, **backbone),
                neck=dict(type='ClipPool'), head=dict(type='I3DHead', num_classes=3), expand=OTHER_FRAMES)


def of_timm(name: str, pool: bool = False, **options) -> dict:
    return dict(type='TaskModel', backbone=dict(type='TimmBackbone', name=name, pool=pool, **options),
                neck=None if pool else dict(type='TokenPool', mode='cls'),
                head=dict(type='ClsHead', form='linear', num_classes=5), expand=EXPERTS if not pool else None)


TINY = dict(img_size=32, embed_dim=24, depth=2, num_heads=2)
TINY_VIT, DISTILLED = of_timm('vit_tiny_patch16_224', **TINY), of_timm('deit_tiny_distilled_patch16_224', **TINY)
THINNED = dict(type='SetAbstraction', num_points=10, radius=0.8, num_neighbors=5, widths=(16,))
STATE_SPACE = dict(type='S4D', at='backbone.blocks.*.attn', d_state=4)
OTHER_FRAMES = [dict(type='STDHA', at='backbone.blocks.*.attn', offsets=[-1, 1])]
IMAGES = dict(type='ImagePatchEmbed', img_size=16, patch_size=8)


def saved(folder: Path, model: dict, classes=CLASSES, **whole) -> Path:
    """A checkpoint of a model whose weights and statistics are no fresh ones, with its config as data."""
    built = MODELS.build(dict(model))
    scramble(built)
    for name, value in built.named_buffers():
        if name.endswith('running_mean'):
            value.normal_(std=0.1)
        elif name.endswith('running_var'):
            value.uniform_(0.5, 2)
    meta = dict(cfg=dict(model=model, **whole), dataset_meta=dict(classes=list(classes)))
    return write_checkpoint(folder / 'model.pth', built.state_dict(), meta)


def plain(checkpoint: Path):
    """The model in torch, fused."""
    model = ewa3d.build(checkpoint)
    ewa3d.fuse(model)
    return model.eval()


def outputs(path: Path, inputs: dict) -> dict:
    """What a file computes, by the tools that a reader of it has."""
    if path.suffix == '.pt2':
        return torch.export.load(path).module()(*inputs.values())
    session = pytest.importorskip('onnxruntime').InferenceSession(path)
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, found)))


@pytest.fixture
def onnx():
    for package in ('onnxscript', 'onnxruntime'):
        pytest.importorskip(package, reason=f'ONNX needs {package}')
    return pytest.importorskip('onnx', reason='ONNX needs onnx')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return trained_folder(tmp_path_factory.mktemp('export'))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return saved(tmp_path_factory.mktemp('saved'), classifier(expand=EXPERTS))


# ---- what works ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('suffix', ['.onnx', '.pt2'])
def test_a_trained_classifier(suffix, trained, tmp_path, capsys, monkeypatch, request):
    if suffix == '.onnx':
        request.getfixturevalue('onnx')
    out, source = tmp_path / f'model{suffix}', trained / 'run' / 'epoch_1.pth'
    assert cli.main(['export', str(trained / 'ewa.py'), str(source), str(out), '--points', '48']) == 0
    text = capsys.readouterr().out
    assert 'fused 2 modules' in text and 'inputs: points (batch, points, 3) float32' in text
    assert 'outputs: logits (batch, 3) float32, probabilities (batch, 3) float32' in text
    assert 'may vary: batch from 1 on, points from 6 on; everything else is fixed' in text
    assert 'batch × points: 1 × 6, 2 × 48, 5 × 64' in text and f'wrote {out}' in text
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert str(REPO).encode() not in out.read_bytes()

    model = plain(source)
    for batch, points in ((1, 6), (2, 30), (5, 48), (3, 1000)):
        cloud = torch.randn(batch, points, 3)
        with torch.no_grad():
            expected = model(cloud)
        found = outputs(out, dict(points=cloud))
        torch.testing.assert_close(found['logits'], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found['probabilities'], expected.softmax(-1), atol=1e-5, rtol=1e-4)

    meta = read_metadata(out)
    assert meta['classes'] == list(CLASSES) and meta['varies'] == dict(batch=[1, None], points=[6, None])
    assert meta['inputs'] == dict(points=dict(shape=['batch', 'points', 3], dtype='float32'))
    assert meta['fused']['modules'] == 2 and 'expand' not in meta['config']['model']
    assert meta['difference']['relative'] <= meta['difference']['tolerance'] == DTYPES['float32']
    assert meta['difference']['checked'][0] == dict(batch=1, points=6) and meta['source'] == 'epoch_1.pth'

    monkeypatch.chdir(tmp_path)  # the guide's own lines
    exec(example(GUIDE, f"'model{suffix}'"), {})
    shown = capsys.readouterr().out
    assert "'points': [6, None]" in shown if suffix == '.onnx' else shown.count('[') == 5


CASES = {
    'images': (classifier(IMAGES, EXPERTS, dict(type='TokenPool', mode='cls'), pos='first'), {}),
    'timm': (TINY_VIT, {}),
    'swin': (of_timm('swin_tiny_patch4_window7_224', True, img_size=32, window_size=4, embed_dim=8, depths=(1, 2),
                     num_heads=(2, 2)), {}),
    'normals': (classifier(dict(GROUPS, in_channels=6, skip_origin=True)), dict(num_points=40)),
    'parts of Point-MAE': (segmenter('PointFeaturePropagation', out_dim=16), dict(num_points=40)),
    'parts of Point-BERT': (segmenter('GraphPropagation', fps_levels=(8, 6), graph_dim=8), dict(num_points=40)),
    '3DETR': (detector(), dict(num_points=60)),
    '3DETR-m': (detector(mask_radius=(0.4, 0.8), downsample=THINNED), dict(num_points=60)),
    'RePa': (classifier(expand=[dict(type='RePaFFN', at='backbone.blocks.*.mlp')]), dict(num_points=40)),
    'S4D along a curve': (classifier(order='hilbert', expand=[dict(STATE_SPACE, length=7)]), dict(num_points=40)),
    'S4D of pixels': (dict(type='TaskModel', backbone=dict(type='SequenceEncoder', img_size=4, embed_dim=16, depth=1),
                           neck=dict(type='TokenPool', mode='mean', num_prefix_tokens=0),
                           head=dict(type='ClsHead', form='linear', num_classes=3),
                           expand=[dict(STATE_SPACE, length=16)]), {}),
    'video': (of_clips(dict(IMAGES, type='VideoPatchEmbed', num_frames=3), pos='first'), {}),
    'clips of clouds': (of_clips(dict(GROUPS, type='PointClipEmbed', num_frames=3)), dict(num_points=40)),
}


@pytest.mark.parametrize('name', CASES)
def test_families(name, onnx, tmp_path):
    cfg, options = CASES[name]
    source, out = saved(tmp_path, cfg), tmp_path / 'out.onnx'
    report = export_checkpoint(source, out, **options)
    assert report.written, str(report)
    model = programs.deploy(plain(source), tuple(report.record['inputs']))
    for batch, points in ((1, 24), (4, 77)):
        inputs = example_inputs(dict(model=cfg), batch, seed=7, num_points=points)
        with torch.no_grad():
            expected = model(**inputs)
        found = outputs(out, inputs)
        assert found.keys() == expected.keys() == report.record['outputs'].keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3)


def test_kernels_of_any_length_are_refused(onnx, tmp_path):
    source = saved(tmp_path, classifier(order='z', expand=[STATE_SPACE]))
    with pytest.raises(NotImplementedError, match='cannot be exported to ONNX: the exporter knows no aten'):
        export_checkpoint(source, tmp_path / 'out.onnx', num_points=40)
    assert not (tmp_path / 'out.onnx').exists()


def test_experts_that_stay_know_one_size_of_batch(onnx, tmp_path):
    source = saved(tmp_path, classifier(expand=[dict(type='MoEFFN', at='backbone.blocks.*.mlp', num_experts=2)]))
    with pytest.raises(NotImplementedError, match='the size of the batch built in; --static'):
        export_checkpoint(source, tmp_path / 'out.onnx', num_points=40)
    assert not (tmp_path / 'out.onnx').exists()


def test_weights_that_build_opens(checkpoint, tmp_path):
    out = tmp_path / 'weights.safetensors'
    report = export_checkpoint(checkpoint, out, num_points=40)
    assert report.written and report.record['difference']['absolute'] == 0
    model, cloud = ewa3d.build(out), torch.randn(2, 40, 3)
    assert not any('Experts' in type(module).__name__ for module in model.modules())
    torch.testing.assert_close(model(cloud), plain(checkpoint)(cloud))
    meta = read_metadata(out)
    assert meta['classes'] == list(CLASSES) and meta['config']['model']['backbone']['depth'] == 2
    assert meta['versions']['torch'] == torch.__version__ and 'expand' not in meta['config']['model']


def test_weights_that_do_not_tell_the_categories(tmp_path, monkeypatch):
    cfg = Config.fromfile(find_config('part_seg/point-mae_xs_scratch_synthetic'))
    cfg.merge_from_dict({'model.backbone.tokenizer.num_groups': 8, 'model.backbone.tokenizer.group_size': 8})
    torch.save(ewa3d.build(cfg).state_dict(), tmp_path / 'bare.pth')
    said = []
    monkeypatch.setattr('ewa3d.progress.LINE_SECONDS', -1)
    monkeypatch.setattr('ewa3d.progress.print_log', lambda text, logger: said.append(text))
    report = export_checkpoint(tmp_path / 'bare.pth', tmp_path / 'a.safetensors', cfg, check_batches=(1, 2),
                               check_points=(40, 64))
    said = [text for text in said if text.startswith('export a.safetensors: ')]
    assert '1/5' in said[0] and said[0].endswith('tracing') and '5/5' in said[-1] and said[-1].endswith('comparing')
    assert report.written and set(report.record['inputs']) == {'points', 'category'}
    assert ewa3d.build(tmp_path / 'a.safetensors').neck.num_categories == 13


@pytest.mark.parametrize('cfg', [TINY_VIT, DISTILLED])
def test_weights_for_plain_timm(cfg, tmp_path, monkeypatch):
    from safetensors.torch import load_file
    source, out = saved(tmp_path, cfg), tmp_path / 'vit.safetensors'
    assert export_checkpoint(source, out, timm=True).written
    how = read_metadata(out)['timm']
    model = timm.create_model(how['name'], num_classes=how['num_classes'], **how['kwargs']).eval()
    model.load_state_dict(load_file(out), strict=True)
    images = torch.randn(2, 3, 32, 32)
    if how['num_classes']:
        torch.testing.assert_close(model(images), plain(source)(dict(img=images)))
    assert bool(how['num_classes']) == (cfg is TINY_VIT)  # a distilled model's classifiers see two tokens
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(example(GUIDE, 'timm.create_model'), namespace)
    torch.testing.assert_close(namespace['model'].eval()(images), model(images))


def test_one_size_and_features(checkpoint, onnx, tmp_path):
    out = tmp_path / 'static.onnx'
    report = export_checkpoint(checkpoint, out, dynamic=False, num_points=32, features=True, opset=18)
    assert report.written and report.record['varies'] == {} and 'nothing may vary' in str(report)
    assert report.record['inputs']['points']['shape'] == [1, 32, 3]
    assert next(entry.version for entry in onnx.load(out).opset_import if not entry.domain) == 18
    cloud = torch.randn(1, 32, 3)
    torch.testing.assert_close(outputs(out, dict(points=cloud))['features'], plain(checkpoint).extract(cloud),
                               atol=1e-5, rtol=1e-4)


def test_other_types_of_numbers(checkpoint, tmp_path):
    for dtype in ('float64', 'float16'):
        out = tmp_path / f'{dtype}.pt2'
        assert export_checkpoint(checkpoint, out, dtype=dtype, num_points=40).written
        assert read_metadata(out)['inputs']['points']['dtype'] == dtype
        assert outputs(out, dict(points=torch.randn(3, 20, 3, dtype=getattr(torch, dtype))))['logits'].shape == (3, 3)


# ---- what does not ---------------------------------------------------------------------------------------------------
def test_mistakes(checkpoint, tmp_path, capsys):
    source, out = str(checkpoint), str(tmp_path / 'x.onnx')
    says = lambda *words: fails(capsys, 'export', *words)  # noqa: E731
    assert 'must end in .onnx or .pt2 or .safetensors' in says(source, str(tmp_path / 'x.tflite'))
    assert 'does not exist' in says(str(tmp_path / 'none.pth'), out)
    Path(out).write_text('mine')
    assert f'{out} is there already; --force replaces it' in says(source, out)
    assert 'is a file; a folder was expected' in says(source, f'{out}/y.onnx')
    assert 'check_batches must be at least 1, got 0' in says(source, out, '--force', '--check-batches', '0')
    assert 'opset must be at least 18, got 11' in says(source, out, '--force', '--opset', '11')
    assert 'opset=18 is for .onnx' in says(source, str(tmp_path / 'x.pt2'), '--opset', '18')
    assert 'bfloat16' in says(source, out, '--force', '--dtype', 'bfloat16')
    assert 'TimmBackbone was expected' in says(source, str(tmp_path / 'x.safetensors'), '--timm')
    assert 'has one task' in says(source, str(tmp_path / 'x.pt2'), '--task', 'a')
    assert 'none is given' in says(source, str(tmp_path / 'x.pt2'), '--cfg-options', 'model.x=1')
    assert Path(out).read_text() == 'mine' and len(list(tmp_path.iterdir())) == 1


def test_without_onnx(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programs, 'find_spec', lambda name: None if name == 'onnxscript' else object())
    error = fails(capsys, 'export', str(checkpoint), str(tmp_path / 'x.onnx'))
    assert "onnxscript is not installed: pip install 'ewa3d[export]'" in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize('value', [1., float('nan')])
def test_another_result_is_refused(value, checkpoint, tmp_path, monkeypatch, capsys):
    run = programs.TorchProgram.run
    monkeypatch.setattr(programs.TorchProgram, 'run', lambda self, inputs: {
        name: output + value * (name == 'logits') for name, output in run(self, inputs).items()})
    out = tmp_path / 'x.pt2'
    assert cli.main(['export', str(checkpoint), str(out), '--points', '40']) == 1
    assert f'refused to write {out}' in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_fused_model_that_is_another_one(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, 'TOLERANCE', -1.)
    with pytest.raises(ValueError, match='the fused model is another one'):
        export_checkpoint(checkpoint, tmp_path / 'x.pt2', num_points=40)


def test_models_without_an_exported_form(tmp_path):
    cfg = dict(type='MaskedAutoencoder', backbone=dict(type='TokenEncoder', tokenizer=GROUPS, **SIZES), decoder_depth=1,
               decoder_num_heads=2)
    with pytest.raises(TypeError, match='MaskedAutoencoder cannot be exported: it is for pretraining'):
        export_checkpoint(saved(tmp_path, cfg), tmp_path / 'x.pt2', num_points=40)


def test_the_module_that_cannot_be_a_graph_is_named(checkpoint, tmp_path, monkeypatch):
    from ewa3d.layers.block import Mlp
    forward = Mlp.forward

    def looking(self, x):
        return forward(self, x) * (1 if x.sum() > 0 else 2)

    monkeypatch.setattr(Mlp, 'forward', looking)
    with pytest.raises(NotImplementedError, match=r'backbone\.blocks\.0\.mlp \(Mlp\) cannot be exported: '):
        export_checkpoint(checkpoint, tmp_path / 'x.pt2', num_points=40)
    assert not list(tmp_path.iterdir())


def test_files_of_something_else(tmp_path):
    for name in ('x.onnx', 'x.pt2', 'x.safetensors'):
        (tmp_path / name).write_text('x')
        with pytest.raises((ValueError, ModuleNotFoundError)):
            read_metadata(tmp_path / name)
    with pytest.raises(ValueError, match='ends in'):
        read_metadata('x.json')
    with pytest.raises(FileNotFoundError):
        read_metadata(tmp_path / 'y.onnx')
