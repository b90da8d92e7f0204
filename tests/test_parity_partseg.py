"""Part segmentation: the same weights and inputs give the numbers of the published networks, at every stage."""
import pytest
import torch
from official_partseg import OUT_INDICES, log_probs, partseg

import ewa3d
from ewa3d.convert import convert_checkpoint
from ewa3d.datasets.parts import SHAPENET_PARTS
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.models.partseg import PartSegHead
from ewa3d.models.propagation import GraphPropagation, PointFeaturePropagation
from ewa3d.structures import Sample

TOLERANCE = dict(atol=3e-5, rtol=3e-5)
FIXTURES = [('pointmae_partseg', 'point-mae'), ('pointbert_partseg', 'point-bert')]


def close(found, expected, name):
    torch.testing.assert_close(found, expected, **TOLERANCE, msg=lambda text: f'{name}: {text}')


@pytest.fixture(params=FIXTURES, ids=lambda p: p[0])
def published(request, reference):
    """A fixture, its model and its inputs."""
    name, kind = request.param
    ref = reference(name)
    config = {key: value for key, value in ref.meta['config'].items() if key in (
        'trans_dim', 'num_heads', 'group_size', 'num_group', 'num_part', 'cls_dim', 'fetch_idx', 'fps_levels', 'depth',
        'encoder_dims')}
    model = ewa3d.from_official(kind, ref.path / 'checkpoint.pth', **config)
    return ref, model, dict(points=ref.inputs['points'], category=ref.inputs['category'])


@torch.no_grad()
def test_every_stage(published):
    ref, model, inputs = published
    expected, neck = ref.expected, model.neck
    tokens = model.backbone.tokenize(inputs)
    close(tokens.coord, expected['center'], 'center')
    features = model.backbone.encode(tokens.x, tokens.pos, OUT_INDICES)
    for i, x in zip(OUT_INDICES, features):
        close(x, expected[f'norm_block_{i}'], f'norm_block_{i}')
    if isinstance(neck, PointFeaturePropagation):
        close(tokens.x, expected['patch_tokens'], 'patch_tokens')
        found = neck(features, tokens.coord, inputs)
        close(found.x.transpose(1, 2)[:, ::16], expected['propagated_every16th_channel'], 'propagated')
        close(found.shared[:, -64:], expected['label_feature'].squeeze(-1), 'label_feature')
        return
    stages = {}
    for name, module in neck.named_children():
        module.register_forward_hook(lambda module, args, output, name=name: stages.update({name: output}))
    neck(features, tokens.coord, inputs)
    assert len(stages) == 5
    for name, x in stages.items():
        close(x.transpose(1, 2)[:, ::4], expected[f'{name}_every4th_channel'], name)


def test_output_and_loss(published):
    ref, model, inputs = published
    scores = model(inputs)
    assert scores.shape == (3, 256, 50)
    close(scores.detach(), ref.expected['log_probs'], 'log_probs')
    samples = [Sample(gt_parts=parts) for parts in ref.inputs['part']]
    losses = model(inputs, samples, mode='loss')
    close(losses['loss_seg'].detach(), ref.expected['loss_nll'], 'loss')
    right = (ref.expected['log_probs'].argmax(-1) == ref.inputs['part']).float().mean()
    torch.testing.assert_close(losses['acc'], 100 * right)


def test_expanding_and_fusing_keep_the_numbers(published):
    ref, model, inputs = published
    ewa3d.expand(model, [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)])
    with torch.no_grad():
        close(model(inputs), ref.expected['log_probs'], 'expanded')
        ewa3d.fuse(model)
        close(model(inputs), ref.expected['log_probs'], 'fused')


@pytest.mark.parametrize('kind, sizes', [
    ('point-mae', dict()), ('point-mae', dict(width=20, depth=13, parts=50, categories=16, point=40, hidden=33)),
    ('point-bert', dict()), ('point-bert', dict(width=24, parts=50, categories=16, encoder=24, widths=(8, 12, 16)))])
def test_other_sizes(tmp_path, kind, sizes):
    state = partseg(kind, **sizes)
    torch.save(dict(epoch=3, model_state_dict=state), tmp_path / 'ckpt.pth')
    options = dict(fps_levels=(40, 20)) if kind == 'point-bert' else {}
    model = ewa3d.from_official(kind, tmp_path / 'ckpt.pth', num_heads=2, num_groups=11, group_size=6, **options)
    points, category = torch.randn(4, 70, 3), torch.tensor([0, 2, 1, 2])
    with torch.no_grad():
        tokens = model.backbone.tokenize(points)
        features = model.backbone.encode(tokens.x, tokens.pos, OUT_INDICES)
        levels = model.neck.levels(points) if options else ()
        found = model(dict(points=points, category=category))
        expected = log_probs(state, [x[:, -11:] for x in features], tokens.coord, points, category, *levels)
    assert found.shape == (4, 70, sizes.get('parts', 9))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_official_defaults(tmp_path):
    for kind in ('point-mae', 'point-bert'):
        torch.save(dict(model_state_dict=partseg(kind, width=24)), tmp_path / 'ckpt.pth')
        model = ewa3d.from_official(kind, tmp_path / 'ckpt.pth')
        tokenizer = model.backbone.tokenizer
        assert (tokenizer.num_groups, tokenizer.group_size, tokenizer.skip_origin) == (128, 32, True)
        assert model.neck.out_indices == OUT_INDICES and isinstance(model.head, PartSegHead)
        assert model.backbone.num_prefix_tokens == (kind == 'point-bert')
    assert isinstance(model.neck, GraphPropagation) and model.neck.fps_levels == (512, 256) and model.neck.skip_origin


def test_predictions_are_of_the_parts_that_are_given(tmp_path):
    torch.save(dict(model_state_dict=partseg('point-mae', parts=50, categories=16)), tmp_path / 'ckpt.pth')
    model = ewa3d.from_official('point-mae', tmp_path / 'ckpt.pth', num_heads=2, num_groups=9, group_size=5,
                                parts=SHAPENET_PARTS)
    inputs = dict(points=torch.randn(16, 30, 3), category=torch.arange(16))
    for sample, scores, ids in zip(model(inputs, mode='predict'), model(inputs), SHAPENET_PARTS.values()):
        assert sample.pred_parts.tolist() == (scores[:, ids].argmax(1) + ids[0]).tolist()


def test_blocks_that_are_not_there(tmp_path):
    torch.save(dict(model_state_dict=partseg('point-mae', depth=8)), tmp_path / 'ckpt.pth')
    with pytest.raises(ValueError, match=r'ckpt\.pth: out_indices=\(3, 7, 11\): 11 is not one of the 8 blocks'):
        ewa3d.from_official('point-mae', tmp_path / 'ckpt.pth', num_heads=2)
    assert ewa3d.from_official('point-mae', tmp_path / 'ckpt.pth', num_heads=2, out_indices=[1, 4, 7])
    with pytest.raises(ValueError, match=r'ckpt\.pth: out_indices=\(1, 7\): the weights take the features of 3'):
        ewa3d.from_official('point-mae', tmp_path / 'ckpt.pth', num_heads=2, out_indices=[1, 7])
    with pytest.raises(ValueError, match='num_parts=50 was given, and the weights have num_parts=9'):
        ewa3d.from_official('point-mae', tmp_path / 'ckpt.pth', num_part=50)


@pytest.mark.parametrize('kind, depth', [('point-mae', 12), ('point-mae', 5), ('point-bert', 12), ('point-bert', 5)])
def test_a_model_of_ours_goes_to_the_official_code(tmp_path, kind, depth):
    torch.save(dict(model_state_dict=partseg(kind, depth=depth)), tmp_path / 'official.pth')
    report = convert_checkpoint(kind, tmp_path / 'official.pth', tmp_path / 'ours.pth')
    assert report.written and not report.missing and not report.unexpected
    back = convert_checkpoint(kind, tmp_path / 'ours.pth', tmp_path / 'back.pth', to_official=True)
    assert back.written and 'have to be changed there: ' in str(back) and 'num_categories=3' in str(back)
    state, again = (read_checkpoint(tmp_path / f'{name}.pth')['model_state_dict'] for name in ('official', 'back'))
    assert state.keys() == again.keys() and all(torch.equal(value, again[key]) for key, value in state.items())


def test_another_use_of_class_tokens_does_not_go_there(tmp_path):
    for kind in ('point-mae', 'point-bert'):
        state = {key: value for key, value in partseg(kind).items() if not key.startswith('cls_')}
        if kind == 'point-mae':
            state |= dict(cls_token=torch.ones(1, 1, 12), cls_pos=torch.ones(1, 1, 12))
        torch.save(dict(model_state_dict=state), tmp_path / 'official.pth')
        convert_checkpoint(kind, tmp_path / 'official.pth', tmp_path / 'ours.pth')
        report = convert_checkpoint(kind, tmp_path / 'ours.pth', tmp_path / 'back.pth', to_official=True)
        assert not report.written and 'class token' in report.refused
