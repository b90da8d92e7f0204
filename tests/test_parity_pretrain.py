"""Point-MAE's pretraining step gives the numbers of the published implementation."""
import pytest
import torch
from test_parity import TOLERANCE, config, sorted_rows

import ewa3d
from ewa3d.models.weights import rename

NEIGHBOURS = ('neighborhood', 'target_points')  # sets of points, stored in another order


def autoencoder_config(meta: dict, **options) -> dict:
    c = {**meta['config'], **meta['config']['transformer_config']}
    return dict(type='MaskedAutoencoder', backbone=config(meta)['backbone'], mask_ratio=c['mask_ratio'], loss=c['loss'],
                mask_type=c['mask_type'], decoder_depth=c['decoder_depth'], decoder_num_heads=c['decoder_num_heads'],
                drop_path_rate=c['drop_path_rate'], **options)


@pytest.fixture
def point_mae(reference):
    ref = reference('pointmae_pretrain')
    return ref, ewa3d.build(autoencoder_config(ref.meta), ref.path / 'checkpoint.pth')


@torch.no_grad()
def test_every_stage_and_loss(point_mae):
    ref, model = point_mae
    found = model(dict(points=ref.inputs['points']), mask=ref.inputs['mask'])
    for name in NEIGHBOURS:
        found[name] = sorted_rows(found[name])
    stored = {name: value for name, value in ref.expected.items() if not name.startswith('grad/')}
    assert set(stored) == set(found)
    for name, value in stored.items():
        torch.testing.assert_close(found[name], value, **TOLERANCE, msg=lambda m: f'{name}: {m}')  # noqa: B023


def test_gradients_of_a_step(point_mae):
    ref, model = point_mae
    losses = model(dict(points=ref.inputs['points']), mode='loss', mask=ref.inputs['mask'])
    torch.testing.assert_close(losses['loss_chamfer'].detach(), ref.expected['loss'], **TOLERANCE)
    losses['loss_chamfer'].backward()
    grads = rename({name: p.grad for name, p in model.named_parameters()}, 'point_mae_pretrain', reverse=True)
    stored = {key.removeprefix('grad/'): value for key, value in ref.expected.items() if key.startswith('grad/')}
    assert stored
    for name, value in stored.items():
        torch.testing.assert_close(grads[name], value, **TOLERANCE, msg=lambda m: f'{name}: {m}')  # noqa: B023


def test_the_step_is_what_the_stages_say(point_mae):
    """The step finishes the features of visible patches only, and samples are the same reconstruction in place."""
    ref, model = point_mae
    with torch.no_grad():
        found = model.reconstruct(ref.inputs['points'], ref.inputs['mask'])
        samples = model(ref.inputs['points'], mode='predict', mask=ref.inputs['mask'])
    torch.testing.assert_close(found.predicted, ref.expected['reconstructed_points'], **TOLERANCE)
    torch.testing.assert_close(sorted_rows(found.target), ref.expected['target_points'], **TOLERANCE)
    for i, sample in enumerate(samples):
        center = ref.expected['center'][i][ref.inputs['mask'][i]]
        placed = ref.expected['reconstructed_points'][i] + center.unsqueeze(1)
        torch.testing.assert_close(sample.reconstructed_points, placed.flatten(0, 1), **TOLERANCE)


@torch.no_grad()
def test_expanded_it_keeps_the_published_numbers(point_mae):
    ref, model = point_mae
    ewa3d.expand(model, [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=3),
                         dict(type='EWAFFN', at='decoder.blocks.*.mlp', num_experts=2)])
    for step in (lambda model: None, ewa3d.fuse):
        step(model)
        found = model(ref.inputs['points'], mask=ref.inputs['mask'])
        torch.testing.assert_close(found['reconstructed_points'], ref.expected['reconstructed_points'], **TOLERANCE)


def test_the_file_is_still_a_start_for_a_classifier(reference):
    ref = reference('pointmae_pretrain')
    path = str(ref.path / 'checkpoint.pth')
    classifier = ewa3d.build(dict(config(ref.meta, num_classes=6), pretrained=path))
    whole = ewa3d.build(autoencoder_config(ref.meta, pretrained=path))
    assert not whole.load_report.missing and not whole.load_report.unexpected and not whole.load_report.skipped
    for name, value in whole.backbone.state_dict().items():
        assert torch.equal(classifier.backbone.state_dict()[name], value)
