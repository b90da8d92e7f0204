"""Point-BERT's tokenizer and pretraining step give the numbers of the published implementation."""
import pytest
import torch

import ewa3d
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.models.token_model import MaskedTokenModel
from ewa3d.models.weights import rename
from ewa3d.registry import MODELS

TOLERANCE = dict(atol=3e-5, rtol=3e-5)


def sorted_points(patches):
    """Points of each patch by (x, y, z): their order has no meaning."""
    flat = patches.detach().flatten(0, -3)
    return torch.stack([torch.tensor(sorted(patch.tolist())) for patch in flat]).view_as(patches)


def assert_near(got, wanted, name: str) -> None:
    torch.testing.assert_close(got.detach(), wanted, **TOLERANCE, msg=lambda message: f'{name}: {message}')


def assert_stages(found: dict, expected: dict, names) -> None:
    for name in names:
        if expected[name].is_floating_point():
            assert_near(found[name], expected[name], name)
        else:
            assert torch.equal(found[name], expected[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer
# ---------------------------------------------------------------------------------------------------------------------
def tokenizer_config(c: dict) -> dict:
    return dict(type='DiscreteVAE', num_groups=c['num_group'], group_size=c['group_size'],
                encoder_dim=c['encoder_dims'], num_tokens=c['num_tokens'], token_dim=c['tokens_dims'],
                decoder_dim=c['decoder_dims'], skip_origin=True)


@pytest.fixture(scope='module')
def tokenizer(reference):
    ref = reference('pointbert_dvae')
    cfg = dict(tokenizer_config(ref.meta['config']), pretrained=dict(source=str(ref.path / 'checkpoint.pth')))
    return ref, MODELS.build(cfg).eval()


@torch.no_grad()
def test_every_stage_of_the_tokenizer(tokenizer):
    ref, model = tokenizer
    found = model(ref.inputs['points'], noise=ref.inputs['gumbel_noise'], temperature=ref.inputs['temperature'])
    found['neighborhood'] = sorted_points(found['neighborhood'])
    assert set(ref.expected) <= set(found)
    assert_stages(found, ref.expected, ref.expected)
    assert torch.equal(model.labels(dict(points=ref.inputs['points'])), ref.expected['token_index'])


@torch.no_grad()
def test_losses_and_reconstructions_of_the_tokenizer(tokenizer):
    ref, model = tokenizer
    points, noise = ref.inputs['points'], ref.inputs['gumbel_noise']
    for kind in ('soft', 'hard'):
        losses = model(points, mode='loss', noise=noise, temperature=ref.inputs['temperature'], hard=kind == 'hard')
        for name, value in (('loss_recon', losses['loss_recon']), ('loss_kl', losses['kl'])):
            torch.testing.assert_close(value, ref.expected[f'{kind}/{name}'], **TOLERANCE)
    pred = torch.stack([sample.pred_points for sample in model(points, mode='predict')])
    torch.testing.assert_close(pred, ref.expected['argmax/whole_fine'], **TOLERANCE)


def test_tokenizer_from_the_official_file(tokenizer):
    ref, _ = tokenizer
    c = ref.meta['config']
    other = ewa3d.from_official('dvae', ref.path / 'checkpoint.pth', num_groups=c['num_group'])
    assert not other.training and other.group_size == c['group_size']
    assert torch.equal(other.labels(ref.inputs['points']), ref.expected['token_index'])


# ---------------------------------------------------------------------------------------------------------------------
# The pretraining step
# ---------------------------------------------------------------------------------------------------------------------
def masked_model_config(meta: dict, **options) -> dict:
    c, transformer, dvae = meta['config'], meta['config']['transformer_config'], meta['config']['dvae_config']
    patches = dict(type='PointPatchEmbed', num_groups=dvae['num_group'], group_size=dvae['group_size'],
                   encoder_dim=dvae['encoder_dims'], skip_origin=True)
    backbone = dict(type='TokenEncoder', tokenizer=patches, embed_dim=transformer['trans_dim'],
                    depth=transformer['depth'], num_heads=transformer['num_heads'])
    return dict(type=MaskedTokenModel, backbone=backbone, dvae=tokenizer_config(dvae), cls_dim=transformer['cls_dim'],
                mask_ratio=transformer['mask_ratio'], key_momentum=c['m'], temperature=c['T'], queue_size=c['K'],
                **options)


def draws_of(inputs: dict) -> dict:
    others = ('mask_mixed', 'mask_k', 'mixup_ratio', 'mixup_uniform')
    return dict(mask=inputs['mask_q'], noise={name: inputs[name] for name in others})


@pytest.fixture
def masked_model(reference):
    ref = reference('pointbert_mpm')
    pretrained = dict(source=str(ref.path / 'checkpoint.pth'))
    return ref, MODELS.build(masked_model_config(ref.meta, pretrained=pretrained)).eval()


def state_names(expected: dict) -> list[str]:
    return [name for name in expected if name.startswith(('transformer_k_after/', 'grad/'))]


@torch.no_grad()
def test_every_stage_of_the_pretraining_step(masked_model):
    ref, model = masked_model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = model(dict(points=ref.inputs['points']), **draws_of(ref.inputs))
    assert_stages(found, ref.expected, [name for name in ref.expected if name not in state_names(ref.expected)])
    torch.testing.assert_close(model.extract(ref.inputs['points']), ref.expected['eval_cls_feature'], **TOLERANCE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_losses_gradients_momentum_and_queue(masked_model):
    ref, model = masked_model
    model.training = True  # the state moves, the layers stay in eval mode as those of the reference
    losses = model(ref.inputs['points'], mode='loss', **draws_of(ref.inputs))
    assert_stages(losses, ref.expected, ('loss_mpm_real', 'loss_mpm_mixed', 'loss_mixed_contrast'))
    assert {name for name in losses if 'loss' in name} == {'loss_mpm_real', 'loss_mpm_mixed', 'loss_mixed_contrast'}
    model.parse_losses(losses)[0].backward()
    state = model.state_dict()
    assert_stages(dict(queue_after=state['queue'], queue_ptr_after=state['queue_ptr']), ref.expected,
                  ('queue_after', 'queue_ptr_after'))
    after = rename(state, 'point_bert_pretrain', reverse=True)
    gradients = rename({name: p.grad for name, p in model.named_parameters() if p.grad is not None},
                       'point_bert_pretrain', reverse=True)
    for name in state_names(ref.expected):
        kind, _, key = name.partition('/')
        got = gradients[key] if kind == 'grad' else after[f'transformer_k.{key}']
        assert_near(got, ref.expected[name], name)
    assert state_names(ref.expected)


def test_draws_may_be_given_one_by_one_or_together(masked_model):
    ref, model = masked_model
    given = {name: value for name, value in ref.inputs.items() if name not in ('points', 'mask_q')}
    losses = model(ref.inputs['points'], mode='loss', mask=ref.inputs['mask_q'], **given)
    assert_stages(losses, ref.expected, ('loss_mpm_real', 'loss_mpm_mixed', 'loss_mixed_contrast'))


@torch.no_grad()
def test_the_expanded_model_has_the_published_numbers(reference):
    ref = reference('pointbert_mpm')
    rules = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=3)]
    model = MODELS.build(masked_model_config(ref.meta, expand=rules,
                                             pretrained=dict(source=str(ref.path / 'checkpoint.pth')))).eval()
    names = ('block_2', 'mixed_block_2', 'cls_k', 'loss_moco_plus_mpm', 'loss_mixed_contrast', 'queue_after')
    assert_stages(model(ref.inputs['points'], **draws_of(ref.inputs)), ref.expected, names)
    ewa3d.fuse(model)
    assert_stages(model(ref.inputs['points'], **draws_of(ref.inputs)), ref.expected, names)


@torch.no_grad()
def test_the_pretraining_model_from_the_official_file(reference):
    ref = reference('pointbert_mpm')
    c = ref.meta['config']
    sizes = dict(num_heads=c['transformer_config']['num_heads'], num_groups=c['dvae_config']['num_group'],
                 group_size=c['dvae_config']['group_size'], key_momentum=c['m'])
    model = ewa3d.from_official('point-bert', ref.path / 'checkpoint.pth', **sizes)
    found = model(ref.inputs['points'], **draws_of(ref.inputs))
    assert_stages(found, ref.expected, [name for name in ref.expected if name not in state_names(ref.expected)])


def test_the_state_dict_has_the_published_names(masked_model):
    ref, model = masked_model
    stored = read_checkpoint(ref.path / 'checkpoint.pth')['base_model']
    own = rename(model.state_dict(), 'point_bert_pretrain', reverse=True)
    assert own.keys() == stored.keys() and all(torch.equal(value, stored[key]) for key, value in own.items())
