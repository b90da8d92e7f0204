"""EWA in a run, random generators, epochs for the data, metrics, checkpoints that are kept."""
import copy
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_toys import on_cpu, same, toy_config  # noqa: F401
from torch.utils.data import ConcatDataset, Subset

from ewa3d.datasets import SyntheticShapes
from ewa3d.engine import hooks
from ewa3d.engine.checkpoint import read_checkpoint
from ewa3d.engine.hooks import DatasetEpochHook, get_rng_state, set_rng_state, walk_datasets
from ewa3d.engine.runner import Runner
from ewa3d.layers.experts import iter_experts


def no_validation(cfg: dict) -> dict:
    return dict(cfg, val_dataloader=None, val_cfg=None, val_evaluator=None,
                test_dataloader=None, test_cfg=None, test_evaluator=None)


def experts(model) -> list:
    return [p.detach().clone() for _, module in iter_experts(model) for p in module.expert_parameters()]


class Watch(hooks.Hook):
    """Notes the experts before and after each iteration; runs before or after the EWA hook."""
    priority = 'LOW'

    def __init__(self):
        self.seen, self.rates = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.seen.append(experts(runner.model))
        self.rates.append(next(h.rate for h in runner.hooks if isinstance(h, hooks.EWAHook)))

    def after_train(self, runner):
        self.seen.append(experts(runner.model))


def run_watched(tmp_path, **options):
    cfg = no_validation(toy_config(tmp_path, ewa=True))
    cfg['optim_wrapper'].update(options.pop('optim_wrapper', {}))
    cfg['default_hooks']['ewa'].update(options.pop('ewa', {}))
    runner = Runner.from_cfg({**cfg, **options})
    watch = Watch()
    runner.register_hook(watch)
    runner.train()
    return runner, watch


def spread(tensors) -> float:
    return max(float((t - t.mean(0)).abs().max()) for t in tensors)


def test_full_averaging_keeps_experts_equal(tmp_path):
    """β = (E − 1)/E, constant: after every optimizer step the experts are their mean."""
    _, watch = run_watched(tmp_path, ewa=dict(share_rate=0.5, schedule='constant'))
    assert all(spread(seen) < 1e-7 for seen in watch.seen)


def test_without_sharing_experts_drift(tmp_path):
    _, watch = run_watched(tmp_path, ewa=dict(share_rate=0.0))
    assert spread(watch.seen[-1]) > 1e-3


def test_accumulation_averages_at_real_steps_only(tmp_path):
    """12 iterations in groups of 5: steps after the 5th, the 10th and (the rest) the 12th."""
    runner, watch = run_watched(tmp_path, optim_wrapper=dict(accumulative_counts=5),
                                ewa=dict(share_rate=0.5, schedule='linear'))
    changed = [i for i in range(12) if not same(watch.seen[i], watch.seen[i + 1])]
    assert changed == [4, 9, 11]
    steps = [0] * 5 + [1] * 5 + [2] * 2
    assert [round(r, 9) for r in watch.rates] == [round(watch.rates[[0, 5, 10][s]], 9) for s in steps]
    assert watch.rates[0] < watch.rates[5] < watch.rates[10] <= 0.5
    assert runner.iter == 12


def test_the_rate_follows_max_epochs(tmp_path):
    short = run_watched(tmp_path / 'a', train_cfg=dict(by_epoch=True, max_epochs=1))[1].rates
    long = run_watched(tmp_path / 'b', train_cfg=dict(by_epoch=True, max_epochs=3))[1].rates
    assert len(long) == 3 * len(short) and max(long) > 0.25 and max(short) > 0.2


def test_the_hook_is_gone_after_training(tmp_path):
    runner, _ = run_watched(tmp_path)
    before = experts(runner.model)
    optimizer = runner.optim_wrapper.optimizer
    optimizer.zero_grad()
    optimizer.step()
    assert same(before, experts(runner.model))


def test_an_interrupted_training_leaves_no_second_averaging(tmp_path):
    """Training again with the same Runner objects: the handle of the first attempt is replaced, not joined."""
    runner = Runner.from_cfg(no_validation(toy_config(tmp_path, ewa=True, epochs=1)))

    class Interrupt(hooks.Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            raise KeyboardInterrupt

    runner.register_hook(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        runner.train()
    hook, = (h for h in runner.hooks if isinstance(h, hooks.EWAHook))
    first = hook.handle
    removed = []
    remove, first.remove = first.remove, lambda: removed.append(remove())
    hook.before_train(runner)
    assert removed and hook.handle is not first
    hook.after_train(runner)
    hook.after_train(runner)  # nothing left to remove


def test_a_model_without_experts_is_an_error(tmp_path):
    cfg = toy_config(tmp_path)
    cfg['default_hooks']['ewa'] = dict(type='EWAHook')
    with pytest.raises(ValueError, match='no experts'):
        Runner.from_cfg(cfg).train()


def test_ema_is_taken_after_ewa(tmp_path):
    """With full averaging, the averaged model's experts are equal as well; both sets of weights are stored."""
    cfg = toy_config(tmp_path, ewa=True, ema=True)
    cfg['default_hooks']['ewa'].update(share_rate=0.5, schedule='constant')
    runner = Runner.from_cfg(cfg)
    runner.train()
    checkpoint = read_checkpoint(tmp_path / 'epoch_2.pth')
    assert checkpoint['meta']['weights'] == 'ema'
    raw = {k.removeprefix('module.'): v for k, v in checkpoint['ema_state_dict'].items()}
    live = runner.model.state_dict()
    for key, value in checkpoint['state_dict'].items():
        assert torch.equal(raw[key], live[key])
        if '.mlp.' in key:
            assert spread([value]) < 1e-7
    assert any(not torch.equal(raw[k], v) for k, v in checkpoint['state_dict'].items())


def test_rng_state_round_trip():
    state = get_rng_state()
    draw = lambda: (random.random(), random.gauss(0, 1), np.random.rand(3).tolist(), np.random.randn(),  # noqa: E731
                    torch.rand(3).tolist())
    first = draw()
    set_rng_state(state)
    assert draw() == first
    hooks.seed_rank(3, rank=0)
    one = draw()
    hooks.seed_rank(3, rank=1)
    assert all(a != b for a, b in zip(one, draw()))
    hooks.seed_rank(3, rank=0)
    assert draw() == one


def test_every_wrapped_dataset_hears_the_epoch(tmp_path):
    runner = Runner.from_cfg(toy_config(tmp_path))
    inner = runner.build_dataloader(runner._train_dataloader, seed=0).dataset
    other = copy.copy(inner)
    found = list(walk_datasets(ConcatDataset([Subset(inner, [0]), other])))
    assert inner in found and other in found


def test_augmentation_differs_by_epoch(tmp_path):
    cfg = no_validation(toy_config(tmp_path, workers=1, epochs=2))
    cfg['train_dataloader']['sampler']['shuffle'] = False
    runner = Runner.from_cfg(cfg)
    seen = []

    class Collect(hooks.Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if batch_idx == 0:
                seen.append(data_batch['inputs']['points'][0])

    runner.register_hook(Collect())
    runner.train()
    assert not torch.equal(*seen)


def test_metrics_jsonl(tmp_path):
    runner = Runner.from_cfg(toy_config(tmp_path, ewa=True))
    runner.train()
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [(x['mode'], x['epoch'], x['iter']) for x in lines] == [
        ('train', 1, 6), ('val', 1, 6), ('train', 2, 12), ('val', 2, 12)]
    assert {'lr', 'loss', 'loss_cls', 'share_rate', 'time', 'grad_norm'} <= lines[0].keys()
    assert {'OA', 'mAcc'} <= lines[1].keys() and 0 <= lines[1]['OA'] <= 100
    assert lines[0]['loss'] == pytest.approx(
        np.mean(list(runner.message_hub.get_scalar('train/loss')._log_history)[:6]), rel=1e-6)


def test_checkpoints_that_are_kept(tmp_path):
    cfg = toy_config(tmp_path, epochs=4)
    cfg['default_hooks']['checkpoint'] = dict(type='CheckpointHook', max_keep_ckpts=2, save_best='OA')
    Runner.from_cfg(cfg).train()
    assert sorted(p.name for p in tmp_path.glob('epoch_*.pth')) == ['epoch_3.pth', 'epoch_4.pth']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_4.pth')
    best, = tmp_path.glob('best_OA_epoch_*.pth')
    checkpoint = read_checkpoint(best)
    assert not {'optimizer', 'rng'} & checkpoint.keys() and 'OA' in checkpoint['meta']['metrics']


def test_an_old_checkpoint_outlives_a_failed_write(tmp_path, monkeypatch):
    cfg = toy_config(tmp_path, epochs=2)
    cfg['default_hooks']['checkpoint'] = dict(type='CheckpointHook', max_keep_ckpts=1)
    runner = Runner.from_cfg(cfg)
    save = runner.save_checkpoint

    def failing(out_dir, filename, **kwargs):
        if filename == 'epoch_2.pth':
            raise OSError('disk full')
        save(out_dir, filename, **kwargs)

    runner.save_checkpoint = failing
    with pytest.raises(OSError, match='disk full'):
        runner.train()
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_1.pth')
    assert read_checkpoint(tmp_path / 'epoch_1.pth')['meta']['epoch'] == 1


def test_the_old_best_outlives_a_failed_write(tmp_path, monkeypatch):
    cfg = toy_config(tmp_path, epochs=1)
    cfg['default_hooks']['checkpoint'] = dict(type='CheckpointHook', save_best='OA')
    runner = Runner.from_cfg(cfg)
    runner.train()
    best, = tmp_path.glob('best_*.pth')
    hook, = (h for h in runner.hooks if isinstance(h, hooks.CheckpointHook))
    runner.train_loop._epoch = 2

    def full(*args, **kwargs):
        raise OSError('disk full')

    with monkeypatch.context() as patch:
        patch.setattr(runner, 'save_checkpoint', full)
        with pytest.raises(OSError, match='disk full'):
            hook._save_best_checkpoint(runner, dict(OA=101.0))
    assert best.is_file()
    hook.best_ckpt_path = str(best)
    hook._save_best_checkpoint(runner, dict(OA=102.0))
    assert [p.name for p in tmp_path.glob('best_*.pth')] == ['best_OA_epoch_2.pth']


def test_the_runs_seed_reaches_the_augmentation_of_the_training_data():
    """Two seeds see different clouds; a data set with a seed of its own keeps it."""
    pipeline = [dict(type='RandomJitter'), dict(type='Pack')]

    def first_cloud(run_seed: int, **own):
        dataset = SyntheticShapes(num_samples=13, num_points=32, pipeline=pipeline, **own)
        runner = SimpleNamespace(seed=run_seed, epoch=0, train_dataloader=SimpleNamespace(dataset=dataset))
        DatasetEpochHook().before_train(runner)
        return dataset[0]['inputs']['points']

    assert torch.equal(first_cloud(0), first_cloud(0))
    assert not torch.equal(first_cloud(0), first_cloud(1))
    assert torch.equal(first_cloud(0, seed=5), first_cloud(1, seed=5))


def test_what_is_kept_of_the_scalars_does_not_grow(tmp_path, monkeypatch):
    """The lines of the metrics are the same whatever is kept."""
    found = []
    for kept in (1000, 2):
        monkeypatch.setattr('ewa3d.engine.hooks.KEPT_SCALARS', kept)
        runner = Runner.from_cfg(toy_config(tmp_path / str(kept), ewa=True, epochs=3))
        runner.train()
        lines = map(json.loads, (tmp_path / str(kept) / 'metrics.jsonl').read_text().splitlines())
        found.append([{key: value for key, value in line.items() if key != 'time'} for line in lines])
    assert found[0] == found[1]
    steps = len(runner.train_dataloader)
    assert max(len(history.data[0]) for history in runner.message_hub.log_scalars.values()) <= 2 + steps
