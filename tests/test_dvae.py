"""The discrete tokenizer: its parts against the formulas, its choices, schedules, metrics and training."""
import math

import pytest
import torch
import torch.nn.functional as F
from engine_toys import ToyClouds, toy_config

from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.dvae_hooks import DVAEScheduleHook
from ewa3d.engine.runner import Runner
from ewa3d.engine.schedules import Ramp
from ewa3d.evaluation_pretrain import CodeUsage, ReconstructionError
from ewa3d.models.dvae import DiscreteVAE, FoldingDecoder, code_usage, count_codes, gumbel_softmax, kl_from_uniform
from ewa3d.ops.chamfer import chamfer_distance
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

SIZES = dict(num_groups=6, group_size=8, encoder_dim=16, num_tokens=12, token_dim=10, decoder_dim=16,
             encoder_widths=(8, 8, 16), graph_widths=(8, 8, 12, 12, 16), decoder_widths=(24, 16))


def tokenizer(**options) -> DiscreteVAE:
    return DiscreteVAE(**{**SIZES, **options})


def clouds(B: int = 3, N: int = 40) -> torch.Tensor:
    return torch.rand(B, N, 3) - 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------
def naive_fold(decoder: FoldingDecoder, x):
    """The published decoder: features, grid and coarse points joined for every point, through 1×1 convolutions."""
    B, G, C = x.shape
    x = x.reshape(B * G, C)
    coarse = decoder.mlp(x).view(B * G, -1, 3)
    M = coarse.shape[1]
    grid = torch.tensor([[a, b] for b in (-0.05, 0.05) for a in (-0.05, 0.05)], dtype=x.dtype)
    points = coarse.unsqueeze(2).expand(-1, -1, 4, -1).reshape(B * G, 4 * M, 3)
    joined = torch.cat([x.unsqueeze(1).expand(-1, 4 * M, -1), grid.repeat(M, 1).expand(B * G, -1, -1), points], -1)
    y = joined.transpose(1, 2)
    for layer in decoder.final_conv:
        y = F.conv1d(y, layer.weight.unsqueeze(-1), layer.bias) if hasattr(layer, 'in_features') else layer(y)
    return coarse.view(B, G, M, 3), (y.transpose(1, 2) + points).view(B, G, 4 * M, 3)


@pytest.mark.parametrize('group_size', [4, 12])
def test_folding_is_the_published_one_forward_and_backward(group_size):
    decoder = FoldingDecoder(6, group_size, (10, 8)).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, *decoder.parameters()]
    weights = torch.randn(2, 3, group_size, 3), torch.randn(2, 3, group_size // 4, 3)
    results = []
    for function in (decoder, lambda x: naive_fold(decoder, x)):
        coarse, fine = function(x)
        loss = (fine * weights[0]).sum() + (coarse * weights[1]).sum()
        results.append([coarse, fine, *torch.autograd.grad(loss, inputs)])
    for got, wanted in zip(*results):
        torch.testing.assert_close(got, wanted)


def test_group_sizes_that_no_grid_fits():
    with pytest.raises(ValueError, match='multiple of 4, got 6'):
        FoldingDecoder(6, 6)


def test_gumbel_softmax():
    scores, noise = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, 5)
    soft = gumbel_softmax(scores, noise, 0.7)
    torch.testing.assert_close(soft, ((scores + noise) / 0.7).softmax(-1))
    hard = gumbel_softmax(scores, noise, 0.7, hard=True)
    torch.testing.assert_close(hard, F.one_hot((scores + noise).argmax(-1), 5).float())
    weights = torch.randn_like(soft)
    gradients = [torch.autograd.grad((x * weights).sum(), scores)[0] for x in (soft, hard)]
    torch.testing.assert_close(*gradients)  # straight through


def test_kl_from_uniform_is_torchs():
    scores = torch.randn(3, 7, 11, dtype=torch.float64)
    mean = scores.softmax(-1).mean(1)
    expected = F.kl_div(mean.log(), torch.full_like(mean, -math.log(11)), reduction='batchmean', log_target=True)
    torch.testing.assert_close(kl_from_uniform(scores), expected)
    assert float(kl_from_uniform(torch.zeros(2, 3, 4))) == pytest.approx(0, abs=1e-6)
    extreme = torch.zeros(1, 2, 4).index_fill(2, torch.tensor(1), 300.).requires_grad_()
    kl_from_uniform(extreme).backward()  # probabilities underflow, their logarithms do not
    assert torch.isfinite(extreme.grad).all()


def test_code_usage():
    counts = count_codes(torch.tensor([[0, 0], [3, 3]]), 8)
    assert counts.tolist() == [2, 0, 0, 2, 0, 0, 0, 0]
    used, perplexity = code_usage(counts)
    assert float(used) == 25 and float(perplexity) == pytest.approx(2)
    assert [float(x) for x in code_usage(torch.zeros(4))] == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------
def test_modes_and_shapes():
    model, points = tokenizer(kl_weight=0.5).eval(), clouds()
    labels = model.labels(points)
    assert labels.shape == (3, 6) and labels.dtype == torch.int64 and not labels.requires_grad
    losses = model(dict(points=points), mode='loss')
    assert {key for key in losses if 'loss' in key} == {'loss_recon', 'loss_kl'}
    torch.testing.assert_close(losses['loss_recon'].detach(), losses['cdl1_coarse'] + losses['cdl1_fine'])
    torch.testing.assert_close(losses['loss_kl'].detach(), losses['kl'] / 2)
    assert 0 < losses['codes_used'] <= 100 and 1 <= losses['code_perplexity'] <= 12
    samples = model(dict(points=points), [Sample(metainfo=dict(name=f'c{i}')) for i in range(3)], mode='predict')
    assert [s.name for s in samples] == ['c0', 'c1', 'c2']
    assert samples[0].pred_points.shape == (48, 3) and torch.equal(samples[1].pred_tokens, labels[1])
    stages = model(points)
    torch.testing.assert_close(torch.stack([s.pred_points for s in samples]), stages['argmax/whole_fine'])
    assert stages['logits'].shape == (3, 6, 12) and torch.equal(stages['token_index'], labels)
    assert 'soft/fine' not in stages and torch.equal(stages['fine'], stages['argmax/fine'])


def test_stored_noise_is_replayed():
    model, points = tokenizer(temperature=0.8).eval(), clouds()
    noise = torch.randn(3, 6, 12)
    stages = model(points, noise=noise)
    assert torch.equal(stages['fine'], stages['soft/fine'])
    assert torch.equal(model(points, noise=noise, hard=True)['fine'], stages['hard/fine'])
    for hard in (False, True):
        losses = model(points, mode='loss', noise=noise, hard=hard)
        torch.testing.assert_close(losses['loss_recon'], stages['hard/loss_recon' if hard else 'soft/loss_recon'])
    again = model(points, noise=noise.double())  # numpy's default: the model keeps its own precision
    assert torch.equal(again['fine'], stages['fine']) and again['fine'].dtype == torch.float32
    colder = model(points, mode='loss', noise=noise, temperature=0.1)
    assert not torch.equal(colder['loss_recon'], model(points, mode='loss', noise=noise)['loss_recon'])
    assert not torch.equal(model(points, mode='loss')['loss_recon'], model(points, mode='loss')['loss_recon'])


def test_compiles_as_one_graph_for_all_temperatures():
    model = tokenizer().train()
    center, patches = model.group(clouds())
    graphs = []
    compiled = torch.compile(model.reconstruct, fullgraph=True, backend=lambda graph, _: graphs.append(1) or graph)
    noise = torch.randn(3, 6, 12)
    for temperature in (1., 0.7, 0.2):
        inputs = center, patches, torch.tensor(temperature), noise
        for got, wanted in zip(compiled(*inputs), model.reconstruct(*inputs)):
            torch.testing.assert_close(got, wanted)
    assert len(graphs) == 1


def test_both_graph_networks_share_one_graph(monkeypatch):
    model, calls = tokenizer(), []
    graph = model.graph
    monkeypatch.setattr(model, 'graph', lambda center: calls.append(1) or graph(center))
    for mode in ('tensor', 'loss', 'predict'):
        calls.clear()
        model(clouds(), mode=mode)
        assert len(calls) == 1, mode


@pytest.mark.parametrize('options, error, message', [
    (dict(num_groups=3), ValueError, 'num_neighbors=4 cannot be found among num_groups=3'),
    (dict(group_size=6), ValueError, 'multiple of 4'), (dict(num_tokens=10), ValueError, '10 channels'),
    (dict(num_tokens=12.), TypeError, 'num_tokens must be an integer'),
    (dict(decoder_widths=(8,)), ValueError, r'widths must be two integers, got \(8,\)'),
    (dict(decoder_widths=(8, 0)), ValueError, 'each of widths must be at least 1, got 0'),
    (dict(temperature=0), ValueError, 'temperature'), (dict(kl_weight=-1), ValueError, 'kl_weight'),
])
def test_impossible_sizes(options, error, message):
    with pytest.raises(error, match=message):
        tokenizer(**options)


def test_bad_inputs():
    model = tokenizer()
    for points, message in ((torch.rand(2, 5, 3), '5 points are too few'), (torch.rand(2, 40, 4), 'shape'),
                            (torch.rand(40, 3), 'shape')):
        with pytest.raises(ValueError, match=message):
            model(points)
    with pytest.raises(ValueError, match=r'\(3, 6, 12\), got \(3, 6, 8\)'):
        model(clouds(), mode='loss', noise=torch.zeros(3, 6, 8))
    with pytest.raises(ValueError, match=r'a tensor of the shape .* got ndarray'):
        model(clouds(), noise=torch.zeros(3, 6, 12).numpy())
    with pytest.raises(ValueError, match=r'temperature must lie in \(0, inf\), got 0.0'):
        model(clouds(), temperature=0)
    with pytest.raises(ValueError, match="mode='lose'"):
        model(clouds(), mode='lose')


def test_a_checkpoint_of_other_sizes_is_refused(tmp_path):
    torch.save(dict(base_model=tokenizer().state_dict()), tmp_path / 'dvae.pth')
    tokenizer(pretrained=dict(source=str(tmp_path / 'dvae.pth')))
    with pytest.raises(ValueError, match=r'other shapes.*16'):
        tokenizer(num_tokens=16, pretrained=dict(source=str(tmp_path / 'dvae.pth')))


def test_training_lowers_the_loss_and_bf16_works():
    model = MODELS.build(dict(type='DiscreteVAE', **SIZES))
    data = ToyClouds(16, 40)
    points = torch.stack([data[i]['inputs']['points'] for i in range(16)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        with torch.autocast('cpu', torch.bfloat16, enabled=step % 3 == 2):
            total, log = model.parse_losses(model(dict(points=points), mode='loss'))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(log['loss_recon'].item())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------
def test_published_schedules_by_iteration():
    ramps = DVAEScheduleHook().ramps
    for n in (0, 1, 5_000, 50_000, 99_999, 100_000, 250_000):
        progress = min(n / 100_000, 1)
        expected = 0.0625 + (1 - 0.0625) * (1 + math.cos(math.pi * progress)) / 2
        assert ramps['temperature'](n, 123) == pytest.approx(expected, abs=1e-12)
    for n, expected in ((0, 0), (9_999, 0), (10_000, 0), (60_000, 0.05), (110_000, 0.1), (300_000, 0.1)):
        assert ramps['kl_weight'](n, 123) == pytest.approx(expected, abs=1e-12)


def test_ramp_in_shares_of_the_run():
    ramp = Ramp(2., 0., length=0.5, begin=0.25)
    assert [ramp(n, 80) for n in (0, 20, 40, 60, 79)] == pytest.approx([2, 2, 1, 0, 0])
    assert Ramp(0., 1.)(30, 60) == pytest.approx(0.5)
    for options, error in ((dict(length=0), ValueError), (dict(length=0.), ValueError), (dict(length=1.5), ValueError),
                           (dict(begin=-1), ValueError), (dict(begin=True), TypeError)):
        with pytest.raises(error, match=r'length|begin'):
            Ramp(0., 1., **options)
    with pytest.raises(ValueError, match='above 0'):
        DVAEScheduleHook(temperature=dict(target=0.))


def dvae_config(work_dir, epochs: int = 2, **options) -> dict:
    cfg = toy_config(work_dir, epochs=epochs, **options)
    cfg['model'] = dict(type='DiscreteVAE', **SIZES)
    cfg['val_evaluator'] = cfg['test_evaluator'] = [dict(type='ReconstructionError'),
                                                    dict(type='CodeUsage', num_tokens=12)]
    cfg['default_hooks']['schedule'] = dict(type='DVAEScheduleHook', temperature=dict(length=1.),
                                            kl_weight=dict(begin=0.25, length=0.5))
    return cfg


def test_a_run_follows_its_schedules_and_resumes_exactly(tmp_path):
    runner = Runner.from_cfg(dvae_config(tmp_path / 'whole'))
    runner.train()
    metrics = runner.last_metrics
    assert metrics['CD-L1'] > 0 and 0 < metrics['codes_used'] <= 100 and metrics['codes'] <= 12
    assert runner.model.temperature == Ramp(1., 0.0625)(11, 12)
    assert runner.model.kl_weight == pytest.approx(0.1)
    lines = [line for line in (tmp_path / 'whole' / 'metrics.jsonl').read_text().splitlines() if '"train"' in line]
    assert all(f'"{key}"' in lines[0] for key in ('temperature', 'kl_weight', 'codes_used', 'loss_recon'))
    resumed = Runner.from_cfg(dict(dvae_config(tmp_path / 'resumed'), resume=str(tmp_path / 'whole' / 'epoch_1.pth')))
    resumed.train()
    states = [read_checkpoint(tmp_path / name / 'epoch_2.pth')['state_dict'] for name in ('whole', 'resumed')]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_spread_scores():
    """Before the activation, every code's score has mean 0 and the spread; so all codes have a chance."""
    torch.manual_seed(0)
    model, points = tokenizer().double(), clouds(8).double()
    model.dgcnn_1.layer5[1].bias.data.uniform_(-1, 1)
    for spread in (3., 0.5):
        model.spread_scores(dict(points=points), spread)
        scores = model.scores(*model.group(points))
        before = torch.where(scores < 0, scores / 0.2, scores).flatten(0, 1)  # undo the leaky ReLU
        torch.testing.assert_close(before.mean(0), torch.zeros(12, dtype=torch.float64), atol=1e-9, rtol=0)
        torch.testing.assert_close(before.std(0), torch.full((12,), spread, dtype=torch.float64))


def test_the_hook_spreads_scores_before_the_first_step_only(tmp_path):
    cfg = dvae_config(tmp_path, epochs=1)
    cfg['default_hooks']['schedule']['score_spread'] = 2.
    runner = Runner.from_cfg(cfg)
    calls = []
    runner.model.spread_scores = lambda inputs, spread: calls.append((runner.iter, inputs['points'].ndim, spread))
    runner.train()
    assert calls == [(0, 3, 2.)]
    for bad in (0., -1., 'wide'):
        with pytest.raises((TypeError, ValueError), match='score_spread'):
            DVAEScheduleHook(score_spread=bad)


def test_the_hook_needs_a_tokenizer(tmp_path):
    cfg = dvae_config(tmp_path)
    cfg['model'] = toy_config(tmp_path)['model']
    cfg['val_evaluator'] = cfg['test_evaluator'] = dict(type='Accuracy')
    with pytest.raises(TypeError, match='TaskModel has none'):
        Runner.from_cfg(cfg).train()


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------
def test_reconstruction_error_is_the_mean_over_clouds():
    points, pred = clouds(4), clouds(4, 30)
    metric = ReconstructionError(prefix='val')
    for part in (slice(0, 3), slice(3, 4)):
        metric.process(dict(inputs=dict(points=list(points[part]))), [dict(pred_points=p) for p in pred[part]])
    result = metric.evaluate(4)
    assert result['val/CD-L1'] == pytest.approx(1000 * float(chamfer_distance(pred, points, norm='l1')), rel=1e-5)
    assert result['val/CD-L2'] == pytest.approx(1000 * float(chamfer_distance(pred, points, norm='l2')), rel=1e-5)
    with pytest.raises(ValueError, match='0 samples were evaluated'):
        metric.evaluate(4)
    with pytest.raises(KeyError, match="sample 'chair_1' needs 'pred_points'"):
        metric.process(dict(inputs=dict(points=points[:1])), [dict(name='chair_1')])


def test_code_usage_over_a_data_set():
    metric = CodeUsage(num_tokens=10)
    metric.process(None, [dict(pred_tokens=torch.tensor([1, 1, 2])), dict(pred_tokens=torch.tensor([2, 2, 1]))])
    metric.process(None, [dict(pred_tokens=torch.tensor([5, 5, 5]))])
    result = metric.evaluate(3)
    assert result['codes_used'] == 30 and result['codes'] == 3 and result['code_perplexity'] == pytest.approx(3)
    with pytest.raises(ValueError, match='tokens from 0 to 10, outside of 0 … 9'):
        metric.process(None, [dict(pred_tokens=torch.tensor([0, 10]))])
    for _ in range(2):
        metric.process(None, [dict(pred_tokens=torch.tensor([0]))])
    with pytest.raises(ValueError, match='2 samples were evaluated and the data set has 1'):
        metric.evaluate(1)
