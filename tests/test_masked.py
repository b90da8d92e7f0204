"""MaskedAutoencoder: what is masked stays hidden, training of every kind works, errors say what was expected."""
import copy

import pytest
import torch
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from torch import nn

import ewa3d
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.runner import Runner
from ewa3d.fusing import fuse_checkpoint
from ewa3d.layers.experts import iter_experts
from ewa3d.layers.tokenizers import PointPatchEmbed
from ewa3d.ops import nearest_squared
from ewa3d.registry import MODELS
from ewa3d.structures import Sample, Tokens

TOKENIZER = dict(type='PointPatchEmbed', num_groups=8, group_size=5, widths=(8, 8, 16), pos_dim=8)
BACKBONE = dict(type='TokenEncoder', tokenizer=TOKENIZER, embed_dim=16, depth=2, num_heads=2)
EWA = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)]
DECODER_EWA = [dict(type='EWAFFN', at='decoder.blocks.*.mlp', num_experts=3)]


def config(**options) -> dict:
    return copy.deepcopy(dict(type='MaskedAutoencoder', backbone=BACKBONE, decoder_depth=2, decoder_num_heads=2,
                              mask_ratio=0.6, pos_dim=8) | options)


def build(**options) -> nn.Module:
    return MODELS.build(config(**options))


def clouds(B=3, N=40):
    return torch.randn(B, N, 3)


def fixed_mask(B=3, G=8, M=4):
    return torch.stack([torch.randperm(G) < M for _ in range(B)])


# ---------------------------------------------------------------------------------------------------------------------
# What it computes
# ---------------------------------------------------------------------------------------------------------------------
def test_names_of_the_parameters():
    keys = set(build().state_dict())
    heads = {'mask_token', 'decoder_pos_embed.0.weight', 'decoder_pos_embed.2.bias', 'decoder.norm.weight',
             'decoder.blocks.1.mlp.fc2.weight', 'decoder.blocks.0.attn.qkv.weight', 'increase_dim.weight',
             'backbone.tokenizer.encoder.first_conv.0.weight', 'backbone.blocks.1.norm1.bias', 'backbone.norm.weight'}
    assert heads <= keys and not any('cls' in key for key in keys)
    assert {key.split('.')[0] for key in keys} == {'backbone', 'mask_token', 'decoder', 'decoder_pos_embed',
                                                  'increase_dim'}


def test_initialisation_is_the_published_one():
    model = build(backbone=dict(BACKBONE, embed_dim=64), decoder_depth=1)
    fc1 = model.decoder.blocks[0].mlp.fc1
    bound = (6 / (64 + 256)) ** 0.5
    assert 0.95 * bound < fc1.weight.abs().max() <= bound and not fc1.bias.any()
    assert model.backbone.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.4)


@pytest.mark.parametrize('mask_type', ['rand', 'block'])
@pytest.mark.parametrize('ratio, masked', [(0.6, 4), (0.13, 1), (0.9, 7)])
def test_shapes_and_counts(mask_type, ratio, masked):
    model = build(mask_type=mask_type, mask_ratio=ratio)
    found = model.reconstruct(clouds())
    assert found.predicted.shape == found.target.shape == (3, masked, 5, 3)
    assert found.visible.shape == (3, 8 - masked)
    every = torch.cat([found.visible, found.masked], 1)
    assert every.sort(1)[0].tolist() == [list(range(8))] * 3
    stages = model(clouds())
    assert stages['encoder_visible'].shape == (3, 8 - masked, 16) and stages['decoder_block_1'].shape == (3, 8, 16)


def test_a_given_mask_is_what_is_masked():
    model, points, mask = build().eval(), clouds(), fixed_mask()
    found = model.reconstruct(points, mask)
    for i in range(3):
        assert found.masked[i].tolist() == mask[i].nonzero().flatten().tolist()
        assert torch.equal(found.target[i], found.patches[i][mask[i]])
    losses = [model(points, mode='loss', mask=mask)['loss_chamfer'] for _ in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(model(points, mask=mask)['loss'], losses[0]) or \
        torch.allclose(model(points, mask=mask)['loss'], losses[0], rtol=1e-5)


def test_masks_are_drawn_anew_each_time():
    model, points = build().eval(), clouds()
    first, second = (model.reconstruct(points).masked for _ in range(2))
    assert not torch.equal(first, second)


class PlainTokenizer(nn.Module):
    """The points themselves as tokens, in no known class: a linear layer, and a target that is no part of it."""
    group_size = 2

    def __init__(self, embed_dim=16, target=(2, 3)):
        super().__init__()
        self.embed_dim, self.target = embed_dim, target
        self.linear = nn.Linear(3, embed_dim)

    def forward(self, inputs):
        points = inputs['points']
        target = None if self.target is None else points.unsqueeze(2).expand(-1, -1, *self.target)
        return Tokens(self.linear(points), torch.zeros(*points.shape[:2], self.embed_dim), torch.zeros_like(points),
                      target)


def test_nothing_of_a_masked_token_reaches_the_reconstruction():
    model = build(backbone=dict(BACKBONE, tokenizer=PlainTokenizer())).eval()
    points, mask = clouds(2, 6), torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]]).bool()
    predicted = model.reconstruct(dict(points=points), mask).predicted
    other = torch.where(mask.unsqueeze(-1), points + 1, points)
    assert torch.equal(model.reconstruct(dict(points=other), mask).predicted, predicted)
    other = torch.where(mask.unsqueeze(-1), points, points + 1)
    assert not torch.allclose(model.reconstruct(dict(points=other), mask).predicted, predicted)


@pytest.mark.parametrize('training', [True, False])
def test_sparing_masked_patches_changes_nothing(training):
    """Batch statistics and gradients included: against all features, gathered afterwards."""
    class Wrapped(nn.Module):
        group_size, embed_dim = 5, 16

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, inputs):
            return self.inner(inputs)

    spared = build(drop_path_rate=0., backbone=dict(BACKBONE, drop_path_rate=0.)).double().train(training)
    whole = copy.deepcopy(spared)
    whole.backbone.tokenizer = Wrapped(whole.backbone.tokenizer)
    assert isinstance(spared.backbone.tokenizer, PointPatchEmbed)
    points, mask = clouds().double(), fixed_mask()
    losses = [model(dict(points=points), mode='loss', mask=mask)['loss_chamfer'] for model in (spared, whole)]
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss, list(model.parameters())) for loss, model in zip(losses, (spared, whole))]
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    for a, b in zip(spared.buffers(), whole.buffers()):
        torch.testing.assert_close(a, b)


def test_losses_of_both_kinds():
    points, mask = clouds(), fixed_mask()
    for name in ('cdl1', 'cdl2'):
        model = build(loss=name).eval()
        stages = model(points, mask=mask)
        assert torch.equal(stages['loss'], stages[f'loss_{name}'])
        torch.testing.assert_close(model(points, mode='loss', mask=mask)['loss_chamfer'], stages['loss'])
    there, back = stages['chamfer_d2_pred_to_gt'], stages['chamfer_d2_gt_to_pred_mean_per_patch']
    assert there.shape == (12, 5) and back.shape == (12,)
    torch.testing.assert_close(there.mean() + back.mean(), stages['loss_cdl2'])


def test_predict_places_the_patches():
    model, points = build().eval(), clouds(2)
    samples = [Sample(metainfo=dict(name=f'c{i}', index=i)) for i in range(2)]
    with torch.no_grad():
        found = model(dict(points=points), samples, mode='predict')
    assert [s.name for s in found] == ['c0', 'c1']
    for cloud, sample in zip(points, found):
        assert sample.visible_points.shape == (4 * 5, 3) and sample.reconstructed_points.shape == (4 * 5, 3)
        assert torch.equal(sample.pred_points, torch.cat([sample.visible_points, sample.reconstructed_points]))
        # what is visible are points of the cloud
        assert nearest_squared(sample.visible_points[None], cloud[None]).max() < 1e-10
    assert len(model(dict(points=points), mode='predict')) == 2


def test_the_feature_for_a_linear_classifier():
    for cls_token in (False, True):
        model, points = build(backbone=dict(BACKBONE, cls_token=cls_token)).eval(), clouds()
        tokens = model.backbone(dict(points=points))[:, int(cls_token):]
        torch.testing.assert_close(model.extract(points), tokens.mean(1) + tokens.max(1)[0])
        torch.testing.assert_close(model.extract(dict(points=points)), model.extract(points))


def test_a_backbone_with_a_class_token_is_possible():
    model = build(backbone=dict(BACKBONE, cls_token=True))
    model(clouds(), mode='loss')['loss_chamfer'].backward()
    assert model.backbone.cls_token.grad.any()
    assert model(clouds())['encoder_block_0'].shape == (3, 4, 16)


def test_points_may_have_features():
    tokenizer = dict(TOKENIZER, in_channels=6)
    model = build(backbone=dict(BACKBONE, tokenizer=tokenizer))
    assert model.reconstruct(torch.randn(2, 30, 6)).target.shape == (2, 4, 5, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('rules', [[], EWA, DECODER_EWA, EWA + DECODER_EWA], ids=['plain', 'enc', 'dec', 'both'])
@pytest.mark.parametrize('low_precision', [False, True], ids=['fp32', 'bf16'])
def test_every_parameter_learns(rules, low_precision):
    model = build(expand=rules, drop_path_rate=0., backbone=dict(BACKBONE, drop_path_rate=0.)).train()
    with torch.autocast('cpu', torch.bfloat16, enabled=low_precision):
        loss = model(clouds(4), mode='loss')['loss_chamfer']
    assert loss.dtype == torch.float32
    loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_reconstruction_improves():
    torch.manual_seed(1)
    model = build(drop_path_rate=0., backbone=dict(BACKBONE, drop_path_rate=0.)).train()
    points, mask = clouds(4), fixed_mask(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(points, mode='loss', mask=mask)['loss_chamfer']
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_compiled_step_is_the_eager_one():
    model = build(expand=EWA, drop_path_rate=0., decoder_depth=1,
                  backbone=dict(BACKBONE, depth=1, drop_path_rate=0.)).train()
    assert model.compiled == 'reconstruct'
    compiled = torch.compile(model.reconstruct, backend='eager', fullgraph=True)
    points, states = clouds(), copy.deepcopy(model.state_dict())
    found = []
    for function in (model.reconstruct, compiled):
        model.load_state_dict(states)  # batch statistics move
        torch.manual_seed(3)
        found.append(function(points))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def pretrain_config(work_dir, model=None, **options) -> dict:
    pipeline = [dict(type='Normalize'), dict(type='Resample', num_points=40, method='random'), dict(type='Pack')]
    loader = dict(batch_size=4, num_workers=0, drop_last=True, sampler=dict(type='DefaultSampler', shuffle=True),
                  dataset=dict(type='SyntheticShapes', split='train', num_samples=16, num_points=64, pipeline=pipeline))
    empty = {f'{split}_{what}': None for split in ('val', 'test') for what in ('dataloader', 'cfg', 'evaluator')}
    return toy_config(work_dir, **{**empty, 'model': model or config(), 'train_dataloader': loader, **options})


def with_ewa(cfg: dict, rules=EWA) -> dict:
    cfg['model']['expand'] = rules
    cfg['default_hooks'] = dict(cfg['default_hooks'], ewa=dict(type='EWAHook', share_rate=0.3, schedule='linear'))
    return cfg


@pytest.mark.parametrize('wrapper', [dict(type='AutocastOptimWrapper'),
                                     dict(type='OptimWrapper', accumulative_counts=2)], ids=['bf16', 'accumulate'])
def test_runs_with_ewa_and_fuses_to_the_same_function(tmp_path, wrapper):
    cfg = with_ewa(pretrain_config(tmp_path, epochs=1), EWA + DECODER_EWA)
    cfg['optim_wrapper'] = dict(cfg['optim_wrapper'], **wrapper)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert len(list(iter_experts(runner.model))) == 4
    report = fuse_checkpoint(tmp_path / 'epoch_1.pth', tmp_path / 'plain.pth')
    assert report.written and report.fused == 4
    plain = ewa3d.build(config(), tmp_path / 'plain.pth')
    points, mask = clouds(), fixed_mask()
    torch.testing.assert_close(plain(points, mask=mask)['reconstructed_points'],
                               runner.model.eval()(points, mask=mask)['reconstructed_points'])


def test_a_resumed_run_is_the_run_without_a_stop(tmp_path):
    Runner.from_cfg(with_ewa(pretrain_config(tmp_path / 'a', epochs=2))).train()
    cfg = with_ewa(pretrain_config(tmp_path / 'b', epochs=2))
    Runner.from_cfg(dict(cfg, resume=str(tmp_path / 'a' / 'epoch_1.pth'))).train()
    one, other = (read_checkpoint(tmp_path / name / 'epoch_2.pth')['state_dict'] for name in 'ab')
    assert same(one, other)


def test_a_pretrained_backbone_goes_on_plain_fused_and_expanded(tmp_path):
    Runner.from_cfg(with_ewa(pretrain_config(tmp_path, epochs=1))).train()
    expanded, plain = tmp_path / 'epoch_1.pth', tmp_path / 'plain.pth'
    fuse_checkpoint(expanded, plain)
    points = clouds()
    trained = ewa3d.build(config(expand=EWA), expanded).backbone(dict(points=points))

    def classifier(path, **options):
        backbone = dict(copy.deepcopy(BACKBONE), cls_token=False)
        return MODELS.build(dict(type='TaskModel', backbone=backbone, neck=dict(type='TokenPool', mode='max'),
                                 head=dict(type='ClsHead', num_classes=3), pretrained=str(path), **options)).eval()

    for model in (classifier(plain), classifier(plain, expand=EWA), classifier(expanded, expand=EWA)):
        torch.testing.assert_close(model.backbone(dict(points=points)), trained)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('options, error, message', [
    (dict(mask_ratio=1.2), ValueError, r'mask_ratio must lie in \(0, 1\), got 1.2'),
    (dict(mask_ratio=0), ValueError, r'mask_ratio must lie in \(0, 1\)'),
    (dict(mask_type='iid'), ValueError, "mask_type='iid'; valid names: block, rand"),
    (dict(mask_ratio='half'), TypeError, "mask_ratio must be a number, got 'half'"),
    (dict(mask_ratio=0.1), ValueError, r'mask_ratio=0.1 masks 0 of 8 patches'),
    (dict(mask_type='blok'), ValueError, "mask_type='blok'; did you mean 'block'"),
    (dict(loss='cd2'), ValueError, "loss='cd2'; did you mean 'cdl2'"),
    (dict(decoder_depth=0), ValueError, 'TokenDecoder: depth must be at least 1'),
    (dict(decoder_num_heads=3), ValueError, 'dim=16 cannot be split among num_heads=3'),
    (dict(drop_path_rate=1.), ValueError, r'TokenDecoder: drop_path_rate must lie in \[0, 1\)'),
    (dict(group_size=6), ValueError, "group_size=6, but the tokenizer's patches have 5 points"),
    (dict(pos_dim=0), ValueError, 'pos_dim must be at least 1'),
    (dict(maskratio=0.6), TypeError, "did you mean 'mask_ratio'"),
])
def test_refuses_settings(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_refuses_masks():
    model, points = build(), clouds()
    unequal = fixed_mask()
    unequal[0] = torch.arange(8) < 6
    for mask, message in ((unequal, r'equally many patches of every cloud, got \[4, 6\]'),
                          (torch.zeros(3, 8).bool(), 'masks 0 of 8'), (torch.ones(3, 8).bool(), 'masks 8 of 8'),
                          (torch.zeros(3, 7).bool(), r'shape \(3, 8\).*got torch.bool \(3, 7\)'),
                          (torch.zeros(3, 8), 'bool tensor .* got torch.float32'), ([True], 'got list')):
        with pytest.raises(ValueError, match=message):
            model(points, mode='loss', mask=mask)


def test_refuses_what_gives_no_targets():
    with pytest.raises(ValueError, match='PlainTokenizer, does not say how many points a patch has: give group_size'):
        tokenizer = PlainTokenizer()
        tokenizer.group_size = None
        build(backbone=dict(BACKBONE, tokenizer=tokenizer))
    model = build(backbone=dict(BACKBONE, tokenizer=PlainTokenizer(target=None)))
    with pytest.raises(ValueError, match='gives no targets: its tokenizer must return Tokens with the patches'):
        model(dict(points=clouds(2, 6)), mode='loss')
    model = build(backbone=dict(BACKBONE, tokenizer=PlainTokenizer(target=(4, 3))))
    with pytest.raises(ValueError, match=r'shape \(2, 6, 2, 3\) were expected, the tokenizer gives \(2, 6, 4, 3\)'):
        model(dict(points=clouds(2, 6)))
    with pytest.raises(ValueError, match=r'mask_ratio=0.6 masks 0 of 1 patches'):
        model(dict(points=clouds(2, 1)), mode='loss')


def test_refuses_clouds_that_are_too_small_and_other_modes():
    model = build()
    with pytest.raises(ValueError, match='7 points are too few for num_groups=8'):
        model(clouds(2, 7), mode='loss')
    with pytest.raises(ValueError, match="mode='los': did you mean 'loss'"):
        model(clouds(), mode='los')
