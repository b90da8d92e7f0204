"""Stop-and-resume equals one uninterrupted run, bit for bit on the CPU."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_toys import on_cpu, same, toy_config, write_config  # noqa: F401

from ewa3d.cli import main
from ewa3d.engine import intact
from ewa3d.engine.checkpoint import find_last_checkpoint, read_checkpoint
from ewa3d.engine.runner import Runner

HARD = dict(ewa=True, ema=True, workers=1, epochs=3,
            optim_wrapper=dict(type='AutocastOptimWrapper', clip_grad=dict(max_norm=10), constructor='ParamGroups',
                               paramwise_cfg=dict(expert_lr_mult=2.0),
                               optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05, fused=True)))


class Stop(Exception):
    """Stands for a killed process."""


def train(cfg: dict, stop_after: int | None = None, stop_in: str = 'after_train_epoch') -> Runner:
    """Train; with ``stop_after`` the process 'dies' once epoch ``stop_after`` has passed the named stage."""
    runner = Runner.from_cfg(cfg)
    if stop_after is not None:
        call = runner.call_hook

        def dying(stage, **kwargs):
            call(stage, **kwargs)
            done = runner.iter if 'iter' in stage else runner.epoch
            if stage == stop_in and done + (stage != 'after_val_epoch') == stop_after:
                raise Stop

        runner.call_hook = dying
        with pytest.raises(Stop):
            runner.train()
    else:
        runner.train()
    return runner


def assert_same_run(one: Path, other: Path, epoch: int) -> None:
    a, b = (read_checkpoint(folder / f'epoch_{epoch}.pth') for folder in (one, other))
    for key in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'rng'):
        assert (key in a) == (key in b)
        assert same(a.get(key), b.get(key)), key
    lines = [[{k: v for k, v in json.loads(line).items() if k != 'time'}
              for line in (folder / 'metrics.jsonl').read_text().splitlines()] for folder in (one, other)]
    assert lines[0] == lines[1]


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    """The work dir of the run without a stop."""
    folder = tmp_path_factory.mktemp('whole')
    torch.manual_seed(0)
    train(toy_config(folder, **HARD))
    return folder


@pytest.mark.parametrize('stage', ['after_train_epoch', 'after_val_epoch'])
def test_resume_is_exact(whole, tmp_path, stage):
    """EWA, EMA, dropout, augmentation in a worker, shuffling; stopped before or after the validation of epoch 2."""
    cfg = toy_config(tmp_path, **HARD)
    train(cfg, stop_after=2, stop_in=stage)
    torch.manual_seed(123)  # a new process stands somewhere else
    runner = train({**cfg, 'resume': True})
    assert runner.iter == 18
    assert_same_run(whole, tmp_path, 3)


def test_resume_between_the_last_iteration_and_the_end_of_an_epoch(tmp_path):
    """Its line of metrics is written, schedulers that count epochs step, and its checkpoint is saved."""
    for name in ('whole', 'stopped'):
        cfg = toy_config(tmp_path / name, **{**HARD, 'workers': 0})
        cfg['param_scheduler'] = dict(type='MultiStepLR', milestones=[1, 2], gamma=0.3, by_epoch=True)
        cfg['custom_hooks'] = [dict(type='CheckpointHook', interval=3, by_epoch=False, max_keep_ckpts=1)]
        if name == 'stopped':
            train(cfg, stop_after=12, stop_in='after_train_iter')
            assert find_last_checkpoint(tmp_path / name).name == 'iter_12.pth'
            cfg['resume'] = True
        train(cfg)
        assert [p.name for p in (tmp_path / name).glob('iter_*')] == ['iter_18.pth']
        assert len(list((tmp_path / name).glob('epoch_*'))) == 3
    assert_same_run(tmp_path / 'whole', tmp_path / 'stopped', 3)


def test_resume_inside_an_epoch_is_exact(whole, tmp_path):
    cfg = toy_config(tmp_path, **HARD)
    cfg['custom_hooks'] = [dict(type='CheckpointHook', interval=4, by_epoch=False)]
    train(cfg, stop_after=9, stop_in='after_train_iter')
    last = find_last_checkpoint(tmp_path)
    assert last.name == 'iter_8.pth'  # epochs have 6 iterations
    train({**cfg, 'resume': True})
    for key in ('state_dict', 'ema_state_dict', 'rng', 'param_schedulers'):
        assert same(read_checkpoint(whole / 'epoch_3.pth')[key], read_checkpoint(tmp_path / 'epoch_3.pth')[key]), key


def test_resume_between_two_steps_of_an_accumulation_is_exact(tmp_path):
    """Six iterations an epoch in groups of four: the first epoch ends with half a step's gradients."""
    configs = [toy_config(tmp_path / name, ewa=True, epochs=2) for name in 'ab']
    for cfg in configs:
        cfg['optim_wrapper']['accumulative_counts'] = 4
    train(configs[0])
    train(configs[1], stop_after=1)
    assert 'gradients' in read_checkpoint(tmp_path / 'b' / 'epoch_1.pth')
    train({**configs[1], 'resume': True})
    assert_same_run(tmp_path / 'a', tmp_path / 'b', 2)


@pytest.mark.parametrize('kind', ['MoEFFN', 'ResidualMoEFFN'])
def test_mixtures_that_are_averaged_early_resume_exactly(kind, tmp_path):
    configs = [toy_config(tmp_path / name, ewa=True, epochs=3) for name in 'ab']
    for cfg in configs:
        cfg['model']['expand'] = [dict(type=kind, at='backbone.blocks.*.mlp', num_experts=3, capacity_factor=1.,
                                       z_weight=1e-3)]
        cfg['default_hooks']['ewa']['end'] = 0.5
    train(configs[0])
    train(configs[1], stop_after=1)
    torch.manual_seed(123)
    train({**configs[1], 'resume': True})
    assert_same_run(tmp_path / 'a', tmp_path / 'b', 3)
    lines = [json.loads(line) for line in (tmp_path / 'b' / 'metrics.jsonl').read_text().splitlines()]
    trained = [line for line in lines if line['mode'] == 'train']
    assert all(line['loss_balance'] > 0 and line['loss_router_z'] > 0 and line['dropped'] >= 0 and line['load_max'] >= 1
               for line in trained)
    assert [line['share_rate'] > 0 for line in trained] == [True, False, False]


def test_generators_matter(whole, tmp_path):
    """The test above would notice: without the generators' state, the resumed run is another one."""
    cfg = toy_config(tmp_path, **HARD)
    cfg['default_hooks']['rng'] = None
    train(cfg, stop_after=2)
    torch.manual_seed(123)
    train({**cfg, 'resume': True})
    assert not same(read_checkpoint(whole / 'epoch_3.pth')['state_dict'],
                    read_checkpoint(tmp_path / 'epoch_3.pth')['state_dict'])


def test_missing_validation_is_run_first(tmp_path):
    cfg = toy_config(tmp_path, epochs=1)
    train(cfg, stop_after=1, stop_in='after_train_epoch')
    assert [json.loads(x)['mode'] for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == ['train']
    train({**cfg, 'resume': True})
    assert [json.loads(x)['mode'] for x in (tmp_path / 'metrics.jsonl').read_text().splitlines()] == ['train', 'val']


def test_validation_leaves_the_generators_alone(tmp_path):
    """Validating every epoch, or never, trains the same weights."""
    often, never = toy_config(tmp_path / 'a', ewa=True), toy_config(tmp_path / 'b', ewa=True)
    for key in ('val_dataloader', 'val_cfg', 'val_evaluator'):
        never[key] = None
    train(often), train(never)
    a, b = (read_checkpoint(tmp_path / name / 'epoch_2.pth') for name in 'ab')
    assert same(a['state_dict'], b['state_dict'])


def test_moved_work_dir(tmp_path):
    cfg = toy_config(tmp_path / 'old')
    cfg['default_hooks']['checkpoint'] = dict(type='CheckpointHook', save_best='OA', max_keep_ckpts=1)
    train(cfg, stop_after=1, stop_in='after_val_epoch')
    shutil.copytree(tmp_path / 'old', tmp_path / 'new')
    before = {p.name: p.read_bytes() for p in (tmp_path / 'old').iterdir()}
    train({**cfg, 'work_dir': str(tmp_path / 'new'), 'resume': True})
    assert {p.name: p.read_bytes() for p in (tmp_path / 'old').iterdir()} == before  # nothing there was touched
    assert [p.name for p in (tmp_path / 'new').glob('epoch_*.pth')] == ['epoch_2.pth']
    assert len(list((tmp_path / 'new').glob('best_*.pth'))) == 1


def test_auto_resume_without_a_checkpoint_starts_afresh(tmp_path):
    train({**toy_config(tmp_path, epochs=1), 'resume': True})
    assert 'nothing to resume' in (tmp_path / 'train.log').read_text()
    assert (tmp_path / 'epoch_1.pth').is_file()


def test_resume_with_other_length_warns_and_follows(tmp_path):
    cfg = toy_config(tmp_path, epochs=2)
    train(cfg, stop_after=1, stop_in='after_val_epoch')
    longer = toy_config(tmp_path, epochs=4)
    runner = train({**longer, 'resume': True})
    assert runner.iter == 24
    assert 'max_epochs was 2' in (tmp_path / 'train.log').read_text()
    assert runner.optim_wrapper.param_groups[0]['lr'] < 1e-4  # the schedule ended with the longer run


def test_resume_from_weights_only_is_an_error(tmp_path):
    cfg = toy_config(tmp_path, epochs=1)
    cfg['default_hooks']['checkpoint'] = dict(type='CheckpointHook', save_best='OA')
    train(cfg)
    best = next(tmp_path.glob('best_*.pth'))
    with pytest.raises(ValueError, match='holds weights but no training state'):
        train({**cfg, 'resume': str(best)})
    with pytest.raises(FileNotFoundError, match='missing'):
        train({**cfg, 'resume': str(tmp_path / 'missing.pth')})


def test_a_fresh_run_in_a_used_folder_keeps_the_old_metrics_apart(tmp_path):
    train(toy_config(tmp_path, epochs=2))
    train(toy_config(tmp_path, epochs=1))
    assert 'holds an earlier run' in (tmp_path / 'train.log').read_text()
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 2
    assert len((tmp_path / 'metrics.previous.jsonl').read_text().splitlines()) == 4


def test_nothing_is_lost_where_a_fresh_run_fails_or_stops_before_its_first_checkpoint(tmp_path):
    train(toy_config(tmp_path, epochs=2))
    config = (tmp_path / 'config.py').read_text()
    with pytest.raises(FileNotFoundError, match=r'load_from: .*mising\.pth'):
        train(toy_config(tmp_path, epochs=1, load_from=str(tmp_path / 'mising.pth')))
    assert find_last_checkpoint(tmp_path).name == 'epoch_2.pth' and (tmp_path / 'config.py').read_text() == config
    (tmp_path / 'other.pth').write_bytes(b'no checkpoint')
    with pytest.raises(ValueError, match=r'other\.pth'):
        train(toy_config(tmp_path, epochs=1, load_from=str(tmp_path / 'other.pth')))
    assert find_last_checkpoint(tmp_path).name == 'epoch_2.pth'
    train(toy_config(tmp_path, epochs=3), stop_after=2, stop_in='after_train_iter')
    assert '--resume continues the earlier run from' in (tmp_path / 'train.log').read_text()
    assert find_last_checkpoint(tmp_path).name == 'epoch_2.pth'
    train({**toy_config(tmp_path, epochs=3), 'resume': True})
    assert find_last_checkpoint(tmp_path).name == 'epoch_3.pth'


@pytest.mark.parametrize('pointer', [None, b'', bytes(12), b'\xff/epoch_9.pth', b'elsewhere/epoch_9.pth'])
def test_a_run_goes_on_where_the_pointer_is_not_there_or_damaged(tmp_path, pointer, monkeypatch):
    """As that of a run that was killed between its first checkpoint and the pointer to it."""
    def die(*args):
        raise Stop

    cfg = toy_config(tmp_path, epochs=2)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr('ewa3d.engine.saving.atomic_write', die)
        train(cfg)
    assert not (tmp_path / 'last_checkpoint').exists()
    if pointer is not None:
        (tmp_path / 'last_checkpoint').write_bytes(pointer)
    train({**cfg, 'resume': True})
    assert find_last_checkpoint(tmp_path).name == 'epoch_2.pth'
    log = (tmp_path / 'train.log').read_text()
    assert 'last_checkpoint' in log and 'Going on from' in log and 'epoch_1.pth, the newest intact one' in log
    assert len((tmp_path / 'metrics.jsonl').read_text().splitlines()) == 4


def test_a_resumed_run_reads_its_checkpoint_once(tmp_path, monkeypatch):
    train(toy_config(tmp_path, epochs=1))
    read, content = [], intact.read_checkpoint
    monkeypatch.setattr(intact, 'read_checkpoint', lambda path: read.append(path) or content(path))
    cfg = toy_config(tmp_path, epochs=2)
    path = write_config(tmp_path / 'config_of_two.py', cfg)
    assert main(['train', str(path), '--resume']) == 0
    assert len(read) == 1 and not intact._kept


def test_lines_of_metrics_that_are_none_are_dropped(tmp_path):
    train(toy_config(tmp_path, epochs=1))
    path = tmp_path / 'metrics.jsonl'
    whole = path.read_bytes()
    path.write_bytes(b'[1]\n{}\n"x"\n{"epoch": "1", "mode": "val"}\n\xff\xfe\n' + whole + bytes(40))
    train({**toy_config(tmp_path, epochs=2), 'resume': True})
    found = path.read_bytes()
    assert found.startswith(whole.splitlines()[0]) and len(list(map(json.loads, found.splitlines()))) == 4


def test_every_set_of_earlier_metrics_is_kept(tmp_path):
    for epochs in (3, 2, 1):
        train(toy_config(tmp_path, epochs=epochs))
    lines = [len((tmp_path / f'metrics.{name}').read_text().splitlines())
             for name in ('previous.jsonl', 'previous-2.jsonl', 'jsonl')]
    assert lines == [6, 4, 2]
