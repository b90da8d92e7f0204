"""Two and four gloo ranks in processes of their own: what a run of them must have in common with one process.

Without BatchNorm and dropout, plain training is the same curve. With EWA it is not, because every rank deals its own
tokens out: there, the ranks are one process that goes through their batches one after the other, each with the rank's
generator, and makes a step of all of them; and all ranks have the same experts bit for bit.
"""
import copy
import json
import math
import os
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from engine_toys import same, toy_config
from mixed_toys import mixed_config
from mmengine.model import convert_sync_batchnorm
from ranks import run_ranks
from test_box_ap import CLASSES, scene
from test_part_iou import PARTS
from test_part_iou import sample as shape
from test_sharded import expanded
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

import ewa3d
from ewa3d.engine import runner as runners
from ewa3d.engine.averaging import attach_ewa
from ewa3d.engine.checkpoint import load_model_state, read_checkpoint
from ewa3d.engine.parallel import batch_size_of, check_sync_bn
from ewa3d.engine.ranks import PeerError
from ewa3d.engine.runner import Runner
from ewa3d.engine.sharding import gathered
from ewa3d.layers.experts import iter_experts
from ewa3d.registry import METRICS, MODELS

SGD = dict(type='SGD', lr=0.2, momentum=0.9)
# accumulated: six iterations in two epochs, a step crosses the boundary; the rate is that for batches of 32
PLAIN = dict(optimizer=SGD)
ACCUMULATED = dict(optimizer=SGD, accumulate=2, ema=True,
                   auto_scale_lr=dict(enable=True, base_batch_size=32, rule='sqrt'))
EXPERTS = dict(ewa=True)
SHARDS = dict(ewa=True, model_wrapper_cfg=dict(type='FullyShard'))
RUNS = {2: dict(plain=PLAIN, experts=EXPERTS, shards=SHARDS), 4: dict(accumulated=ACCUMULATED, experts=EXPERTS)}


def config(folder, ranks: int = 1, optimizer=None, accumulate: int = 1, **options) -> dict:
    """A ViT on images: no BatchNorm, no dropout. 24 samples in whole batches of 8; 9 to validate on."""
    cfg = toy_config(folder, **options)
    cfg['model'].update(
        backbone=dict(type='TokenEncoder', embed_dim=16, depth=2, num_heads=2, pos='first', drop_path_rate=0.,
                      tokenizer=dict(type='ImagePatchEmbed', img_size=8, patch_size=4, in_channels=1, embed_dim=16)),
        neck=dict(type='TokenPool', mode='cls'), head=dict(type='ClsHead', form='linear'))
    for split, size in (('train', 24), ('val', 9), ('test', 9)):
        cfg[f'{split}_dataloader'].update(batch_size=8 // ranks,
                                          dataset=dict(type='ToyImages', num_samples=size, split=split))
    cfg['optim_wrapper'].update(accumulative_counts=accumulate, **dict(optimizer=optimizer) if optimizer else {})
    if ranks > 1:
        cfg['launcher'] = 'pytorch'
    return cfg


def train(cfg: dict, prepare=lambda runner: None) -> dict:
    """What is left of a run: its losses, weights and metrics, and how many checkpoints this process wrote."""
    written, write = [], runners.write_checkpoint
    runners.write_checkpoint = lambda path, *args, **kwargs: written.append(write(path, *args, **kwargs))
    try:
        runner = Runner.from_cfg(cfg)
        prepare(runner)
        runner.train()
    finally:
        runners.write_checkpoint = write
    scalars = runner.message_hub.log_scalars
    ema = [hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')]
    return dict(losses=scalars['train/loss'].data[0].tolist(), norms=scalars['train/grad_norm'].data[0].tolist(),
                state=gathered(getattr(runner.model, 'module', runner.model).state_dict()),
                ema=gathered(ema[0].module.state_dict()) if ema else {}, metrics=runner.last_metrics,
                lr=runner.optim_wrapper.optimizer.param_groups[0]['initial_lr'], written=len(written))


def preempt(cfg: dict, rank: int) -> int | None:
    """The code with which a run ends of which one rank gets a SIGTERM in the fifth iteration."""
    def send(runner) -> None:
        call = runner.call_hook

        def calling(name, **kwargs):
            if name == 'before_train_iter' and runner.iter == 4 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            call(name, **kwargs)
        runner.call_hook = calling

    try:
        train(cfg, send)
    except SystemExit as stop:
        return stop.code
    return None


def normed(folder, ranks: int, **options) -> dict:
    """With experts, and with a BatchNorm, of which each rank has statistics of its own until an epoch ends."""
    cfg = config(folder, ranks, **EXPERTS, **options)
    cfg['model']['head'] = dict(type='ClsHead', hidden=16)
    return cfg


def evaluating(cfg: dict) -> dict:
    training = ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg',
                'val_evaluator')
    return {**cfg, **dict.fromkeys(training), 'default_hooks': {}}


def synchronised(folder: str, ranks: int) -> dict:
    """With ``sync_bn``, a CPU cannot train and does evaluate."""
    cfg = toy_config(f'{folder}/sync', sync_bn='torch', launcher='pytorch')
    with pytest.raises((ValueError, PeerError), match=r"sync_bn='torch': .* GPUs only"):  # of this rank or of the other
        Runner.from_cfg(cfg)
    return Runner.from_cfg(evaluating(cfg)).test()


def job(rank: int, folder: str, ranks: int) -> dict:
    results = {name: train(config(f'{folder}/{name}', ranks, **options)) for name, options in RUNS[ranks].items()}
    results['metrics'] = metrics(rank, ranks)
    if ranks == 4:
        results['loop'] = loop(rank)
        return results
    results['synchronised'] = synchronised(folder, ranks)
    results['normed'] = train(normed(f'{folder}/normed', ranks))
    results['code'] = preempt(normed(f'{folder}/preempted', ranks), rank)
    results['preempted'] = train(normed(f'{folder}/preempted', ranks, resume=True))
    first = f'{folder}/shards/epoch_1.pth'
    results['resumed'] = train(config(f'{folder}/resumed', ranks, resume=first, **SHARDS))
    runner = Runner.from_cfg(config(f'{folder}/loaded', ranks, load_from=f'{folder}/plain/epoch_2.pth', **SHARDS))
    runner.load_or_resume()
    results['loaded'] = gathered(runner.model.state_dict())
    return results


# ---- a plain loop with EWA ---------------------------------------------------------------------------------------
def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(10 * step + rank))


def loop(rank: int) -> dict:
    model = expanded()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_ewa(optimizer, model, share_rate=0.3, schedule='constant')
    torch.manual_seed(100 + rank)
    for step in range(3):
        wrapped(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def loop_alone(ranks: int) -> dict:
    model = expanded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_ewa(optimizer, model, share_rate=0.3, schedule='constant')
    states = [torch.Generator().manual_seed(100 + rank).get_state() for rank in range(ranks)]
    for step in range(3):
        for rank in range(ranks):
            torch.set_rng_state(states[rank])
            (model(batch(rank, step)).square().mean() / ranks).backward()
            states[rank] = torch.get_rng_state()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


# ---- metrics ------------------------------------------------------------------------------------------------------
SIZES = (7, 3)  # neither is a multiple of the ranks; of three, a fourth rank gets none


def metrics(rank: int = 0, ranks: int = 1) -> dict:
    """All metrics of samples that are dealt out as DefaultSampler(round_up=False) does."""
    torch.manual_seed(5)
    labels = [dict(gt_label=i % 3, pred_scores=torch.rand(3).softmax(0), source='clouds' if i % 2 else 'images')
              for i in range(max(SIZES))]
    classes = dict(classes=['a', 'b', 'c'])
    data = dict(Accuracy=(labels, classes),
                PartIoU=([shape(i % len(PARTS)) for i in range(max(SIZES))], dict(parts=PARTS)),
                BoxAP=([scene() for _ in range(max(SIZES))], dict(classes=CLASSES)),
                TaskMetrics=(labels, dict(sources=dict.fromkeys(('clouds', 'images'), classes))))
    options = dict(BoxAP=dict(min_points=0),
                   TaskMetrics=dict(tasks={key: dict(type='Accuracy') for key in ('clouds', 'images')}))
    found = {}
    for name, (samples, meta) in data.items():
        for size in SIZES:
            metric = METRICS.build(dict(type=name, **options.get(name, {})))
            metric.dataset_meta = meta
            for sample in samples[:size][rank::ranks]:
                metric.process({}, [sample])
            found[f'{name}, {size} samples'] = metric.evaluate(size)
    return found


def lines_of(folder: Path) -> list[dict]:
    """The numbers in ``metrics.jsonl``."""
    lines = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ('time', 'mode')} for line in lines]


# ---- what must hold -----------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    return folder, {ranks: run_ranks(job, ranks, f'{folder}/{ranks}', ranks) for ranks in (2, 4)}


@pytest.mark.parametrize(('ranks', 'name', 'options'), [(2, 'plain', PLAIN), (4, 'accumulated', ACCUMULATED)])
def test_the_curve_is_that_of_one_process(runs, tmp_path, ranks, name, options):
    folder, found = runs[0] / str(ranks) / name, [result[name] for result in runs[1][ranks]]
    alone = train(config(tmp_path, **options))
    assert len(alone['losses']) == 6 and max(alone['losses']) - min(alone['losses']) > 0.01  # it moves
    means = [sum(losses) / ranks for losses in zip(*(result['losses'] for result in found))]
    assert means == pytest.approx(alone['losses'], rel=1e-5)
    for result in found:
        for key in ('state', 'ema'):
            assert result[key].keys() == alone[key].keys()
            for entry, value in alone[key].items():
                torch.testing.assert_close(result[key][entry], value, rtol=1e-4, atol=1e-6, msg=entry)
        assert result['norms'] == pytest.approx(alone['norms'], rel=1e-4)
        assert result['metrics'] == alone['metrics']  # nine samples
        assert result['lr'] == alone['lr'] == pytest.approx(0.2 * (math.sqrt(8 / 32) if name == 'accumulated' else 1))
    for line, other in zip(lines_of(folder), lines_of(tmp_path), strict=True):
        assert line == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize('ranks', [2, 4])
def test_experts_are_equal_on_all_ranks_and_one_rank_writes(runs, ranks):
    first, *others = (result['experts'] for result in runs[1][ranks])
    experts = {key: value for key, value in first['state'].items() if '.mlp.' in key}
    assert experts and all(float((value - value.mean(0)).abs().max()) > 0 for value in experts.values())
    for other in others:
        assert same(first['state'], other['state'])
        assert other['losses'] != first['losses'] and other['written'] == 0
    assert first['written'] == 2
    environment = json.loads((runs[0] / str(ranks) / 'experts' / 'environment.json').read_text())
    assert environment['rank_seeds'] == list(range(ranks))
    generators = [state['torch'] for state in
                  read_checkpoint(runs[0] / str(ranks) / 'experts' / 'epoch_2.pth')['rng']]
    assert len({bytes(state.numpy()) for state in generators}) == ranks


def test_ranks_with_experts_are_one_process_with_all_their_partitions(runs):
    ranks = [result['loop'] for result in runs[1][4]]
    assert all(same(ranks[0], other) for other in ranks[1:])
    for key, value in loop_alone(4).items():
        torch.testing.assert_close(ranks[0][key], value, msg=key)


@pytest.mark.parametrize('ranks', [2, 4])
def test_metrics_are_those_of_one_process(runs, ranks):
    alone = metrics()
    for result in runs[1][ranks]:
        assert result['metrics'].keys() == alone.keys()
        for name, values in alone.items():
            # the order of a sum of IoUs is another one: the last digit of a double
            expected = pytest.approx(values, rel=1e-13, abs=0) if name.startswith('PartIoU') else values
            assert result['metrics'][name] == expected, name


def test_sigterm_to_one_rank_ends_all_with_a_checkpoint(runs):
    for result in runs[1][2]:
        assert result['code'] == 0
        assert any('running_mean' in key for key in result['normed']['state'])
        assert same(result['preempted']['state'], result['normed']['state'])
        assert result['preempted']['losses'][-1] == result['normed']['losses'][-1]
    for line, other in zip(*(lines_of(runs[0] / '2' / name) for name in ('preempted', 'normed')), strict=True):
        assert line == pytest.approx(other, rel=1e-12)


def test_sync_bn_converts_and_a_cpu_cannot_train_it(runs, tmp_path):
    runner = Runner.from_cfg(evaluating(toy_config(tmp_path)))
    alone = runner.test()
    assert all(result['synchronised'] == alone for result in runs[1][2])
    model = runner.model.eval()
    points = dict(points=torch.randn(2, 48, 3))
    before, keys = model(points), model.state_dict().keys()
    check_sync_bn(model, on_gpu=True)
    model = convert_sync_batchnorm(model).eval()
    kinds = {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds == {nn.SyncBatchNorm} and model.state_dict().keys() == keys
    assert torch.equal(model(points), before)
    ewa3d.expand(model, [dict(type='RePaFFN', at='backbone.blocks.*')])
    with pytest.raises(ValueError, match=r"would replace 'backbone\.blocks\.0.*', a TokenBatchNorm"):
        check_sync_bn(model, on_gpu=True)


def test_shards_by_config_train_as_whole_models(runs):
    whole, shards, resumed = ([result[name] for result in runs[1][2]] for name in ('experts', 'shards', 'resumed'))
    for one, other in zip(whole, shards):  # the same ranks, seeds and partitions
        assert other['losses'] == pytest.approx(one['losses'], rel=1e-4)
        assert other['norms'] == pytest.approx(one['norms'], rel=1e-4)
        assert other['metrics'] == one['metrics']
    for key, value in whole[0]['state'].items():
        torch.testing.assert_close(shards[0]['state'][key], value, rtol=1e-3, atol=1e-5, msg=key)
    assert same(shards[0]['state'], resumed[0]['state'])
    assert [one['losses'] for one in resumed] == [one['losses'][3:] for one in shards]
    assert shards[0]['written'] == 2 and shards[1]['written'] == 0


def test_checkpoints_of_shards_are_those_of_a_whole_model(runs, tmp_path):
    ours, theirs = (read_checkpoint(runs[0] / '2' / name / 'epoch_2.pth') for name in ('shards', 'experts'))

    def shapes(tree):
        if isinstance(tree, torch.Tensor):
            return tuple(tree.shape)
        return {key: shapes(value) for key, value in tree.items()} if isinstance(tree, dict) else None

    for key in ('state_dict', 'optimizer'):
        assert shapes(ours[key]) == shapes(theirs[key])
    cfg = ours['meta']['cfg']
    model = MODELS.build(copy.deepcopy(cfg['model']))
    load_model_state(model, ours['state_dict'])
    img = dict(img=torch.randn(2, 1, 8, 8))
    expected = model.eval()(img)
    ewa3d.fuse(model)
    assert not list(iter_experts(model))
    torch.testing.assert_close(model(img), expected)
    whole = train(config(tmp_path, resume=str(runs[0] / '2' / 'shards' / 'epoch_1.pth'), **EXPERTS))  # in one process
    assert len(whole['losses']) == 3


def test_a_plain_checkpoint_loads_into_shards(runs):
    plain = read_checkpoint(runs[0] / '2' / 'plain' / 'epoch_2.pth')['state_dict']
    loaded = runs[1][2][0]['loaded']
    assert loaded.keys() == plain.keys()
    for key, value in plain.items():  # every expert is the plain FFN
        assert torch.equal(loaded[key], value.expand(loaded[key].shape)), key


def test_mixed_batches_on_more_ranks_than_samples(tmp_path):
    alone, ranks = mixed_metrics(), run_ranks(mixed_metrics, 4)
    assert all(result == alone for result in ranks) and {'clouds/OA', 'images/OA'} <= set(alone)


def mixed_metrics(rank: int | None = None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cfg = mixed_config(folder)
        cfg['test_dataloader']['dataset']['sources'].update(
            clouds=dict(type='ToyClouds', num_samples=2, split='test'),
            images=dict(type='ToyImages', num_samples=3, split='test'))
        if rank is not None:
            cfg['launcher'] = 'pytorch'
        return Runner.from_cfg(evaluating(cfg)).test()


@pytest.mark.parametrize(('options', 'error', 'message'), [
    (dict(auto_scale_lr=dict(enable=True)), KeyError, 'auto_scale_lr has no base_batch_size'),
    (dict(auto_scale_lr=dict(enable=True, base_batch_size=0)), ValueError, r'auto_scale_lr\.base_batch_size is 0'),
    (dict(auto_scale_lr=dict(enable=True, base_batch_size=8, rule='cubic')), ValueError, "'cubic'; 'linear' or"),
    (dict(sync_bn='mmcv'), ValueError, "sync_bn is 'mmcv'; 'torch' was expected"),
    (dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')), ValueError, "flattens .*; use 'FullyShard'"),
    (dict(model_wrapper_cfg=dict(type='FullyShard', att='x')), TypeError, "model_wrapper_cfg takes no 'att'"),
    (dict(model_wrapper_cfg=dict(type='FullyShard'), ema=True), ValueError, 'EMAHook does not go together'),
    (dict(model_wrapper_cfg=dict(type='FullyShard'), accumulate=2), ValueError, 'accumulative_counts does not go'),
])
def test_what_cannot_be_is_said_before_anything_runs(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        Runner.from_cfg(config(tmp_path, **options))
    assert not list(Path(tmp_path).iterdir())


def test_the_rate_follows_the_whole_batch(tmp_path, monkeypatch):
    for rule, ratio in (('linear', 3), ('sqrt', 3 ** 0.5)):
        scaling = dict(enable=True, base_batch_size=16, rule=rule)
        runner = Runner.from_cfg(config(tmp_path / rule, auto_scale_lr=scaling))
        monkeypatch.setattr(runner, '_world_size', 6)  # batches of 8
        wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        before = [group['lr'] for group in wrapper.optimizer.param_groups]
        runner.scale_lr(wrapper, runner.auto_scale_lr)
        after = [group['lr'] for group in wrapper.optimizer.param_groups]
        assert after == pytest.approx([ratio * rate for rate in before])
        runner.scale_lr(wrapper, dict(base_batch_size=16))  # not enabled
        assert [group['lr'] for group in wrapper.optimizer.param_groups] == after


def test_the_rate_follows_batches_of_mixed_sources_of_one_size(tmp_path):
    runner = Runner.from_cfg(mixed_config(tmp_path, auto_scale_lr=dict(enable=True, base_batch_size=1)))
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    before = [group['lr'] for group in wrapper.optimizer.param_groups]
    runner.scale_lr(wrapper, runner.auto_scale_lr)
    assert [group['lr'] for group in wrapper.optimizer.param_groups] == pytest.approx([4 * rate for rate in before])
    sampler = runner.train_dataloader.batch_sampler
    sampler.sizes = [4, 2]
    with pytest.raises(ValueError, match=r'auto_scale_lr needs batches of one size, .* MixedBatches have 4 and 2'):
        runner.scale_lr(wrapper, runner.auto_scale_lr)


def test_the_batch_size_of_any_loader():
    data = list(range(6))
    assert batch_size_of(DataLoader(data, 3)) == 3
    assert batch_size_of(DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False))) == 2
    with pytest.raises(ValueError, match='needs batches of one size'):
        batch_size_of(DataLoader(data, batch_size=None))
