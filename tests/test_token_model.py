"""Point-BERT's pretraining model: masks and mixtures, contrast, the key network, expansion, transfer, training."""
import copy
import os

import pytest
import torch
import torch.nn.functional as F
from engine_toys import ToyClouds, toy_config
from toys import scramble

import ewa3d
from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
from ewa3d.engine.params import param_groups
from ewa3d.engine.runner import Runner
from ewa3d.evaluation_pretrain import TokenAccuracy
from ewa3d.layers.experts import EWAFFN, iter_experts
from ewa3d.models.contrast import enqueue, gather_keys, mixed_contrast, moco_contrast, plain_parameters
from ewa3d.models.token_model import Draws, MaskedTokenModel
from ewa3d.registry import MODELS
from ewa3d.reparam import Reparam

EWA = [dict(type='EWAFFN', at='backbone.blocks.*.mlp', num_experts=2)]
DVAE = dict(type='DiscreteVAE', encoder_dim=12, num_tokens=12, token_dim=8, decoder_dim=8, encoder_widths=(8, 8, 16),
            graph_widths=(8, 8, 8, 8, 8), decoder_widths=(16, 8))
BACKBONE = dict(type='TokenEncoder', embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.1,
                tokenizer=dict(type='PointPatchEmbed', num_groups=8, group_size=4, embed_dim=16, encoder_dim=12,
                               widths=(8, 8, 16), pos_dim=8))


def config(**options) -> dict:
    return {**dict(type='MaskedTokenModel', backbone=copy.deepcopy(BACKBONE), dvae=copy.deepcopy(DVAE), cls_dim=6,
                   queue_size=10, key_momentum=0.9), **options}


def build(**options) -> MaskedTokenModel:
    return MODELS.build(config(**options))


def clouds(B: int = 4, N: int = 40) -> torch.Tensor:
    return torch.rand(B, N, 3) - 0.5


def step(model, points, lr: float = 0.1, **draws) -> dict:
    """One optimizer step."""
    losses = model(dict(points=points), mode='loss', **draws)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.parse_losses(losses)[0].backward()
    optimizer.step()
    return losses


def draws(B: int = 4, G: int = 8) -> dict:
    masks = {name: torch.rand(B, G) < 0.5 for name in ('mask', 'mask_mixed', 'mask_k')}
    for mask in masks.values():
        mask[0, 0] = True
    return dict(masks, mixup_ratio=torch.rand(B), mixup_uniform=torch.rand(B, G))


# ---------------------------------------------------------------------------------------------------------------------
# Contrast
# ---------------------------------------------------------------------------------------------------------------------
def test_contrast_losses_against_loops():
    q, k = (F.normalize(torch.randn(3, 5), dim=1) for _ in range(2))
    queue, ratio = F.normalize(torch.randn(5, 7), dim=0), torch.rand(3)
    moco, mixed = 0., 0.
    for i in range(3):
        against = [q[i] @ queue[:, j] / 0.1 for j in range(7)]
        moco -= torch.stack([q[i] @ k[i] / 0.1, *against]).log_softmax(0)[0] / 3
        chances = torch.stack([*(q[i] @ k[j] / 0.1 for j in range(3)), *against]).log_softmax(0)
        mixed -= (ratio[i] * chances[i] + (1 - ratio[i]) * chances[2 - i]) / 3
    torch.testing.assert_close(moco_contrast(q, k, queue, 0.1), moco)
    torch.testing.assert_close(mixed_contrast(q, k, queue, ratio, 0.1), mixed)


def test_the_queue_goes_round():
    queue, pointer = torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)
    for first in (1, 4, 7):
        queue, pointer = enqueue(queue, pointer, torch.arange(first, first + 3.).unsqueeze(1))
    assert queue.tolist() == [[6, 7, 8, 9, 5]] and pointer.tolist() == [4]
    with pytest.raises(ValueError, match='6 keys do not fit into a queue of queue_size=5'):
        enqueue(queue, pointer, torch.zeros(6, 1))


# ---------------------------------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------------------------------
def test_masked_tokens_are_not_seen_and_visible_ones_are():
    model, points = build().eval(), clouds()
    given = draws()
    center, patches = model.backbone.tokenizer.group(points)
    drawn = model.draw(center, given)
    before = model.features(center, patches, drawn)
    hidden, seen = (torch.where(m[..., None, None], torch.randn_like(patches), patches)
                    for m in (drawn.mask, ~drawn.mask))
    mixed = drawn._replace(mixup_ratio=torch.ones(4))  # the mixture is the cloud itself
    assert torch.equal(model.features(center, hidden, mixed)[:4], before[:4])
    assert not torch.equal(model.features(center, seen, mixed)[:4], before[:4])


def test_mixtures_take_groups_of_the_mirrored_cloud():
    model, points = build().eval(), clouds()
    given = draws()
    stages = model(points, **given)
    for b in range(4):
        for g in range(8):
            source = b if given['mixup_uniform'][b, g] < given['mixup_ratio'][b] else 3 - b
            assert torch.equal(stages['mixed_center'][b, g], stages['center'][source, g])
            assert stages['mixed_label'][b, g] == stages['dvae_label'][source, g]
    own = model(points, **{**given, 'mask_mixed': given['mask'], 'mixup_ratio': torch.ones(4)})
    torch.testing.assert_close(own['mixed_block_1'], own['block_1'])
    assert torch.equal(own['mixed_label'], own['dvae_label'])


def test_losses_are_those_of_masked_tokens_only():
    model, points, given = build(moco=True).eval(), clouds(), draws()
    stages, losses = model(points, **given), model(points, mode='loss', **given)
    for kind, mask in (('', given['mask']), ('mixed_', given['mask_mixed'])):
        labels = stages['mixed_label' if kind else 'dvae_label'][mask]
        expected = F.cross_entropy(stages[f'{kind}logits_masked'], labels)
        torch.testing.assert_close(losses[f'loss_mpm_{"mixed" if kind else "real"}'], expected)
    unit = {name: F.normalize(stages[name], dim=1) for name in ('cls_q', 'mixed_cls_q', 'cls_k')}
    torch.testing.assert_close(losses['loss_moco'], moco_contrast(unit['cls_q'], unit['cls_k'], model.queue))
    torch.testing.assert_close(losses['loss_mixed_contrast'], mixed_contrast(
        unit['mixed_cls_q'], unit['cls_k'], model.queue, given['mixup_ratio']))
    torch.testing.assert_close(stages['loss_moco_plus_mpm'],
                               sum(losses[name] for name in ('loss_mpm_real', 'loss_mpm_mixed', 'loss_moco')))


def test_drawn_masks_follow_the_ratio():
    for ratio, counts in (((0.25, 0.5), {2, 3, 4}), (0.375, {3})):
        for kind in ('block', 'rand'):
            model = build(mask_ratio=ratio, mask_type=kind)
            drawn = model.draw(torch.rand(200, 8, 3), {})
            assert isinstance(drawn, Draws) and drawn.mask.shape == drawn.mixup_uniform.shape == (200, 8)
            assert set(drawn.mask.sum(1).tolist()) <= counts
            assert not torch.equal(drawn.mask, drawn.mask_k)
    model, points = build(), clouds()
    torch.manual_seed(3)
    drawn = model(points, mode='loss')
    torch.manual_seed(3)
    center = model.backbone.tokenizer.group(points)[0]
    given = model.draw(center, {})._asdict()
    torch.manual_seed(3)
    model.draw(center, {})
    for name, value in model(points, mode='loss', **given).items():
        if name.startswith('loss_mpm'):
            torch.testing.assert_close(value, drawn[name])  # of all tokens, or of as many as can be masked


def test_independent_masks_of_any_number():
    model, points = build(mask_type='iid', mask_ratio=0.5).eval(), clouds()
    assert len(model.draw(torch.rand(200, 8, 3), {}).mask.sum(1).unique()) > 4
    given = {name: value for name, value in draws().items() if name != 'mask'}
    with torch.no_grad():
        torch.manual_seed(0)
        drawn = model(points, mode='loss', **given)
        torch.manual_seed(0)
        mask = model.draw(model.backbone.tokenizer.group(points)[0], given).mask
        stages = model(points, mask=mask, **given)
        assert mask.sum(1).max() > 4  # more than the ratio's share, and none is left out
        torch.testing.assert_close(drawn['loss_mpm_real'], stages['loss_mpm_real'])
        model.make_mask = lambda coord, ratio: torch.zeros(coord.shape[:2], dtype=torch.bool)
        empty = model(points, mode='loss')
    assert empty['loss_mpm_real'] == empty['loss_mpm_mixed'] == empty['acc_masked'] == 0  # and not NaN


def test_numbers_of_another_precision_change_nothing():
    model, points, given = build().eval(), clouds(), draws()
    double = {name: value.double() if name.startswith('mixup') else value for name, value in given.items()}
    with torch.no_grad():
        for name, value in model(points, mode='loss', **double).items():
            wanted = model(points, mode='loss', **given)[name]
            assert torch.equal(value, wanted) and value.dtype == wanted.dtype, name


def test_key_network_and_queue_move_in_training_only():
    model, points = build().eval(), clouds()
    before = copy.deepcopy(model.state_dict())
    for mode in ('loss', 'tensor', 'predict'):
        model(points, mode=mode)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train()
    scramble(model.backbone)
    query = {name: value.clone() for name, value in model.momentum.followed(model).items()}
    keys = {name: value.clone() for name, value in model.momentum.named_parameters()}
    step(model, points)
    for name, value in model.momentum.named_parameters():
        torch.testing.assert_close(value, 0.9 * keys[name] + 0.1 * query[name])
        assert value.grad is None and not value.requires_grad
    assert model.queue_ptr.tolist() == [4] and torch.equal(model.queue[:, 4:], before['queue'][:, 4:])
    torch.testing.assert_close(model.queue[:, :4].norm(dim=0), torch.ones(4))
    statistics = 'momentum.backbone.tokenizer.encoder.first_conv.1.running_mean'
    assert not torch.equal(model.state_dict()[statistics],
                           model.state_dict()[statistics.removeprefix('momentum.')])  # each its own


def test_without_contrast():
    model = build(contrast=False)
    before = copy.deepcopy(model.momentum.state_dict())
    losses = step(model.train(), clouds())
    assert not any('contrast' in name for name in losses) and not model.cls_head[0].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.momentum.state_dict().items())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_tokenizer_is_frozen_and_stored():
    model = build().train()
    assert not model.dvae.training and not any(module.training for module in model.dvae.modules())
    assert model.momentum.training
    before = copy.deepcopy(model.dvae.state_dict())
    step(model, clouds())
    assert all(torch.equal(value, before[name]) for name, value in model.dvae.state_dict().items())
    held = {id(p) for group in param_groups(model) for p in group['params']}
    frozen = [p for part in (model.dvae, model.momentum) for p in part.parameters()]
    assert not held & {id(p) for p in frozen} and all(p.grad is None for p in frozen)
    assert {'dvae.codebook', 'momentum.mask_token', 'queue', 'queue_ptr'} <= set(model.state_dict())


def test_a_tokenizer_without_weights_is_told_once(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr('ewa3d.models.token_model.print_log', lambda text, **_: told.append(text))
    model = build()
    path = str(write_checkpoint(tmp_path / 'dvae.pth', model.dvae.state_dict(), {}))
    for one in (build(dvae=dict(DVAE, pretrained=path)), build(dvae=model.dvae), build(), model.eval()):
        if one is not model:
            one.load_state_dict(model.state_dict())
        one(clouds(), mode='loss')
    assert not told
    for _ in range(2):
        model.train()(clouds(), mode='loss')
    assert len(told) == 1 and 'dvae.pretrained' in told[0]


def test_features_and_predictions():
    model, points = build().eval(), clouds()
    torch.testing.assert_close(model.extract(points), model(points)['eval_cls_feature'])
    assert torch.equal(model.extract(dict(points=points)), model.extract(points))
    mask = draws()['mask']
    samples = model(dict(points=points), mode='predict', mask=mask)
    assert torch.equal(torch.stack([s.masked for s in samples]), mask)
    assert torch.equal(torch.stack([s.gt_tokens for s in samples]), model.dvae.labels(points))
    metric = TokenAccuracy()
    metric.process(None, [s.to_dict() for s in samples])
    hits = sum(int((s.pred_tokens == s.gt_tokens)[s.masked].sum()) for s in samples)
    assert metric.evaluate(4)['token_acc'] == pytest.approx(100 * hits / int(mask.sum()))


def test_training_lowers_the_loss_and_bf16_works():
    model, data = build(expand=EWA, init_encoder=False).train(), ToyClouds(16, 40)
    points = torch.stack([data[i]['inputs']['points'] for i in range(8)])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    with ewa3d.attach_ewa(optimizer, model, total_steps=40):
        for i in range(40):
            with torch.autocast('cpu', torch.bfloat16, enabled=i % 4 == 3):
                found = model(points, mode='loss')
            assert model.queue.dtype == torch.float32
            optimizer.zero_grad()
            model.parse_losses(found)[0].backward()
            optimizer.step()
            losses.append((found['loss_mpm_real'] + found['loss_mpm_mixed']).detach().item())
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_compiles_as_one_graph():
    model = build(backbone=dict(BACKBONE, drop_path_rate=0.)).train()
    center, patches = model.backbone.tokenizer.group(clouds())
    drawn = model.draw(center, {})
    compiled = torch.compile(model.features, backend='eager', fullgraph=True)
    torch.testing.assert_close(compiled(center, patches, drawn), model.features(center, patches, drawn))


# ---------------------------------------------------------------------------------------------------------------------
# EWA
# ---------------------------------------------------------------------------------------------------------------------
def test_the_key_network_follows_the_mean_of_experts():
    model = build(expand=EWA).train()
    assert [name for name, _ in iter_experts(model)] == ['backbone.blocks.0.mlp', 'backbone.blocks.1.mlp']
    step(model, clouds())
    scramble(model.backbone)
    name = 'backbone.blocks.1.mlp.fc1.weight'
    mean, key = model.get_parameter(name).mean(0), model.get_parameter(f'momentum.{name}').clone()
    step(model, clouds())
    torch.testing.assert_close(model.get_parameter(f'momentum.{name}'), 0.9 * key + 0.1 * mean)
    assert not any(isinstance(module, Reparam) for module in model.momentum.modules())
    model.eval()
    given, points = draws(), clouds()
    before = model(points, **given)
    ewa3d.fuse(model)
    after = model(points, **given)
    for stage, value in before.items():
        torch.testing.assert_close(after[stage], value, msg=lambda message, stage=stage: f'{stage}: {message}')


def test_plain_parameters_of_nested_modules():
    model = build(expand=EWA)
    found = plain_parameters(model.backbone)
    fused = copy.deepcopy(model.backbone)
    ewa3d.fuse(fused)
    assert found.keys() == dict(fused.named_parameters()).keys()
    assert all(torch.equal(value, found[name]) for name, value in fused.named_parameters())


class Stays(Reparam):
    """Has no plain form."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    @classmethod
    def expand(cls, plain):
        return cls(plain)

    def forward(self, x):
        return self.plain(x)

    def fuse(self):
        return self


def test_expansions_that_the_key_network_cannot_follow():
    for kind in (Stays, 'MoEFFN', 'RePaFFN'):
        with pytest.raises(ValueError, match=f'is a {getattr(kind, "__name__", kind)}, which does not fuse'):
            build(expand=[dict(type=kind, at='backbone.blocks.*.mlp')])
    with pytest.raises(ValueError, match='is a RePaBlock, which does not fuse'):
        build(expand=[dict(type='RePaFFN', at='backbone.blocks.*')])
    with pytest.raises(ValueError, match=r'momentum.backbone.blocks.0.mlp.fc1.bias has the shape \(2, 64\)'):
        build(expand=[dict(type='EWAFFN', at='momentum.backbone.blocks.*.mlp', num_experts=2)])


@pytest.mark.parametrize('rule', [dict(type='MoEFFN', at='backbone.blocks.*.mlp', num_experts=2),
                                  dict(type='RePaFFN', at='backbone.blocks.*')], ids=lambda rule: rule['type'])
def test_without_contrast_there_is_nothing_to_follow(rule):
    model = build(contrast=False, expand=[rule]).train()
    losses = step(model, clouds())
    assert ('loss_balance' in losses) == (rule['type'] == 'MoEFFN')
    points, given = clouds(), draws()
    before = model.eval()(points, **given)
    ewa3d.fuse(model)
    after = model(points, **given)
    assert 'cls_k' not in before and 'queue_after' not in before
    torch.testing.assert_close(after['loss_moco_plus_mpm'], before['loss_mpm_real'] + before['loss_mpm_mixed'])


# ---------------------------------------------------------------------------------------------------------------------
# Transfer
# ---------------------------------------------------------------------------------------------------------------------
def classifier(pretrained, **options):
    return MODELS.build(dict(type='TaskModel', backbone=copy.deepcopy(BACKBONE), neck=dict(type='TokenPool'),
                             head=dict(type='ClsHead', form='mlp_nobn', num_classes=3, hidden=8),
                             pretrained=str(pretrained), **options))


@pytest.fixture
def checkpoints(tmp_path):
    """An expanded model after some training, its fused twin, and their files."""
    model = build(expand=EWA).train()
    step(model, clouds())
    scramble(model.backbone)
    model.eval()
    plain = copy.deepcopy(model)
    ewa3d.fuse(plain)
    files = {}
    for name, one in (('expanded', model), ('plain', plain)):
        files[name] = write_checkpoint(tmp_path / f'{name}.pth', one.state_dict(), {})
    return model, files


def test_backbone_goes_into_a_classifier_in_every_form(checkpoints):
    model, files = checkpoints
    points = clouds()
    expected = model.backbone(points)
    plain = classifier(files['plain']).eval()  # expanded, fused, plain
    again = classifier(files['plain'], expand=EWA).eval()  # expanded, fused, expanded
    expanded = classifier(files['expanded'], expand=EWA).eval()
    for task in (plain, again, expanded):
        assert not [key for key in task.load_report.missing if key.startswith('backbone.')]
        torch.testing.assert_close(task.backbone(points), expected)
    name = 'backbone.blocks.0.mlp.fc1.weight'
    assert torch.equal(expanded.get_parameter(name), model.get_parameter(name))  # the experts go on as they were
    assert torch.equal(again.get_parameter(name)[0], again.get_parameter(name)[1])
    assert isinstance(expanded.backbone.blocks[0].mlp, EWAFFN)
    with pytest.raises(ValueError, match=r'of an expanded model.*tools/fuse.py'):
        classifier(files['expanded'])


def test_pretraining_goes_on_from_a_checkpoint(checkpoints, tmp_path):
    model, files = checkpoints
    for name, rules in (('expanded', EWA), ('plain', EWA), ('plain', None)):
        other = build(pretrained=str(files[name]), expand=rules)
        assert torch.equal(other.queue, model.queue) and torch.equal(other.dvae.codebook, model.dvae.codebook)
        assert all(torch.equal(value, model.momentum.state_dict()[key])
                   for key, value in other.momentum.state_dict().items())
    backbone = {key: value for key, value in model.state_dict().items() if key.startswith('backbone.')}
    path = write_checkpoint(tmp_path / 'backbone.pth', backbone, {})
    other = build(pretrained=str(path), expand=EWA)  # without a key network: it starts from what was loaded
    query, state = other.momentum.followed(other), other.state_dict()
    for key, value in other.momentum.state_dict().items():
        assert torch.equal(value, query[key] if key in query else state[key]), key


def test_starts_from_the_tokenizers_encoder(tmp_path):
    dvae = MODELS.build(dict(DVAE, num_groups=8, group_size=4))
    scramble(dvae)
    path = str(write_checkpoint(tmp_path / 'dvae.pth', dvae.state_dict(), {}))
    model = build(dvae=dict(DVAE, pretrained=path))
    assert torch.equal(model.dvae.codebook, dvae.codebook)
    for network in (model, model.momentum):
        assert all(torch.equal(value, dvae.encoder.state_dict()[key])
                   for key, value in network.backbone.tokenizer.encoder.state_dict().items())
    other = build(dvae=dict(DVAE, pretrained=path), init_encoder=False)
    assert not torch.equal(other.backbone.tokenizer.encoder.first_conv[0].weight, dvae.encoder.first_conv[0].weight)
    wider = copy.deepcopy(BACKBONE)
    wider['tokenizer']['widths'] = (8, 8, 20)
    with pytest.raises(ValueError, match=r'second_conv.0.weight of the backbone is \(20, 16\), that of the dvae \(16,'):
        build(backbone=wider, dvae=dict(DVAE, pretrained=path))
    with pytest.raises(ValueError, match=r'dvae.pth has other shapes.*\[12, 8\].*\[16, 8\]'):
        build(dvae=dict(DVAE, num_tokens=16, pretrained=path))
    os.remove(path)
    stored = write_checkpoint(tmp_path / 'model.pth', model.state_dict(), {})
    again = ewa3d.build(config(dvae=dict(DVAE, pretrained=path)), stored)  # the tokenizer's own file is not needed
    assert torch.equal(again.dvae.codebook, dvae.codebook)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------
def run_config(work_dir, epochs: int = 2, **options) -> dict:
    cfg = toy_config(work_dir, epochs=epochs, **options)
    cfg['model'] = config(queue_size=16, expand=EWA)
    cfg['default_hooks']['ewa'] = dict(type='EWAHook', share_rate=0.3)
    cfg['optim_wrapper']['constructor'] = 'ParamGroups'
    cfg['val_evaluator'] = cfg['test_evaluator'] = dict(type='TokenAccuracy')
    return cfg


def test_resume_is_exact(tmp_path):
    Runner.from_cfg(run_config(tmp_path / 'whole')).train()
    resumed = Runner.from_cfg(dict(run_config(tmp_path / 'resumed'), resume=str(tmp_path / 'whole' / 'epoch_1.pth')))
    resumed.train()
    states = [read_checkpoint(tmp_path / name / 'epoch_2.pth')['state_dict'] for name in ('whole', 'resumed')]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert int(states[0]['queue_ptr']) == (2 * 6 * 4) % 16 and 0 <= resumed.last_metrics['token_acc'] <= 100


def share_keys(rank: int, folder) -> None:
    """What each of two processes does."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    keys = gather_keys(torch.full((2, 1), rank + 1.))
    torch.save(enqueue(torch.zeros(1, 5), torch.tensor([3]), keys), folder / f'rank{rank}.pt')
    torch.distributed.destroy_process_group()


def test_two_ranks_share_one_queue(tmp_path):
    torch.multiprocessing.start_processes(share_keys, args=(tmp_path,), nprocs=2, start_method='fork')
    for rank in range(2):
        queue, pointer = torch.load(tmp_path / f'rank{rank}.pt', weights_only=True)
        assert queue.tolist() == [[2, 2, 0, 1, 1]] and pointer.tolist() == [2]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------
def without(key: str, **changes) -> dict:
    return {**{k: v for k, v in copy.deepcopy(BACKBONE).items() if k != key}, **changes}


@pytest.mark.parametrize('options, error, message', [
    (dict(backbone=dict(BACKBONE, cls_token=False)), ValueError, 'needs a class token'),
    (dict(backbone=without('tokenizer', tokenizer=torch.nn.Identity())), ValueError, 'got Identity, which gives no'),
    (dict(dvae=dict(DVAE, group_size=8)), ValueError, 'group_size=8, the backbone has patches of group_size=4'),
    (dict(dvae=torch.nn.Linear(2, 2)), TypeError, 'dvae must be a DiscreteVAE or its config, got Linear'),
    (dict(mask_ratio=0.1), ValueError, 'at least one of num_groups=8 patches, got 0.1'),
    (dict(mask_ratio=(0.5, 0.3)), ValueError, r'got \(0.5, 0.3\)'), (dict(mask_ratio=1.2), ValueError, 'mask_ratio'),
    (dict(mask_ratio='many'), TypeError, 'mask_ratio must be a number'),
    (dict(mask_type='blok'), ValueError, "did you mean 'block'"), (dict(queue_size=0), ValueError, 'queue_size'),
    (dict(key_momentum=1.5), ValueError, 'key_momentum'), (dict(temperature=0), ValueError, 'temperature'),
])
def test_bad_settings(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


@pytest.mark.parametrize('given, error, message', [
    (dict(mask=torch.ones(4, 7).bool()), ValueError, r'of the shape \(4, 8\), got torch.bool \(4, 7\)'),
    (dict(mask=torch.ones(4, 8)), ValueError, r'must be a bool tensor.*got torch.float32 \(4, 8\)'),
    (dict(mask_mixed=torch.zeros(4, 8).bool()), ValueError, 'mask_mixed masks no patch'),
    (dict(mixup_ratio=torch.ones(4, 8)), ValueError, r'mixup_ratio must be a tensor of numbers of the shape \(4,\)'),
    (dict(mixup_uniform=[0.5] * 8), ValueError, r'of the shape \(4, 8\), got list'),
    (dict(noise=dict(mask_q=torch.ones(4, 8))), TypeError, "draws no 'mask_q'"),
    (dict(noise=torch.ones(4, 8)), TypeError, 'noise must be a dict with some of mask, mask_mixed, .* got Tensor'),
    (dict(mode='losses'), ValueError, "mode='losses'"),
])
def test_bad_draws(given, error, message):
    with pytest.raises(error, match=message):
        build()(clouds(), **given)


def test_too_few_points_or_room():
    with pytest.raises(ValueError, match='5 points are too few'):
        build()(torch.rand(4, 5, 3), mode='loss')
    with pytest.raises(ValueError, match='12 keys do not fit into a queue of queue_size=10'):
        build().train()(clouds(12), mode='loss')
