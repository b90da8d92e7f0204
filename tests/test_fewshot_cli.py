"""The fewshot command: every fold, the report, going on after a stop, mistakes."""
import json
import statistics
from pathlib import Path

import pytest
from engine_toys import on_cpu, toy_config, write_config  # noqa: F401
from mmengine.config import Config

from ewa3d import cli, fewshot
from ewa3d.engine.runner import Runner

PIPELINE = [dict(type='Resample', num_points=24, method='random'), dict(type='Pack')]


def config(folder: Path, name='few', **options) -> str:
    """A config with folds of the embedded shapes, as a file."""
    cfg = toy_config('x', epochs=2, **options)
    del cfg['work_dir']
    base = dict(type='SyntheticShapes', num_samples=78, num_points=32)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader']['dataset'] = dict(type='FewShot', base=base, way=3, shot=4, queries=3,
                                                     split='train' if split == 'train' else 'test', pipeline=PIPELINE)
    return str(write_config(folder / f'{name}.py', cfg))


def run(*argv: str) -> int:
    return cli.main(['fewshot', *map(str, argv)])


def report_of(folder: Path) -> dict:
    return json.loads((folder / 'fewshot.json').read_text())


def without_time(report: dict) -> dict:
    return dict(report, folds=[{k: v for k, v in fold.items() if k != 'seconds'} for fold in report['folds']])


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    """A finished command: two folds, two-way four-shot."""
    folder = tmp_path_factory.mktemp('few')
    path = config(folder)
    assert run(path, '--way', 2, '--folds', 2, '--work-dir', folder / 'run') == 0
    return folder, path


def test_report(done, capsys):
    folder, path = done
    report = report_of(folder / 'run')
    assert [fold['fold'] for fold in report['folds']] == [0, 1]
    assert {k: report['settings'][k] for k in ('way', 'shot', 'seed')} == dict(way=2, shot=4, seed=0)
    assert 'optimistic' in report['note'] and report['config'] == path
    for fold in report['folds']:
        assert 0 <= fold['last'] <= fold['best'] <= 100 and fold['epochs'] == fold['evaluations'] == 2
    for key in ('last', 'best'):
        values = [fold[key] for fold in report['folds']]
        assert report[key] == dict(mean=statistics.mean(values), std=statistics.stdev(values))
    assert not list((folder / 'run').rglob('*.pth')) and (folder / 'run/fold_1/metrics.jsonl').is_file()
    capsys.readouterr()
    assert run(path, '--way', 2, '--folds', 2, '--work-dir', folder / 'run') == 0  # nothing is left to do
    out = capsys.readouterr().out
    assert '2-way 4-shot, 2 folds, last epoch: ' in out and 'optimistic' in out and ' ± ' in out
    assert report_of(folder / 'run') == report


def test_a_fold_is_a_run_like_any_other(done, tmp_path):
    """The second fold's result does not depend on the first having been run before it."""
    folder, path = done
    cfg = Config.fromfile(path)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader']['dataset'].update(way=2, fold=1)
    cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.last_metrics['OA'] == report_of(folder / 'run')['folds'][1]['last']
    assert runner.model.head.num_classes == 2


def test_folds_that_are_done_are_skipped_and_more_can_follow(done, tmp_path, capsys):
    folder, path = done
    assert run(path, '--way', 2, '--folds', 1, '--work-dir', tmp_path, '--keep-checkpoints') == 0
    assert report_of(tmp_path)['last']['std'] is None and (tmp_path / 'fold_0/epoch_2.pth').is_file()
    assert '1 fold, last epoch: ' in capsys.readouterr().out
    before = (tmp_path / 'fold_0/metrics.jsonl').stat().st_mtime_ns
    assert run(path, '--way', 2, '--folds', 2, '--work-dir', tmp_path) == 0
    out = capsys.readouterr().out
    assert 'fold 1: last' in out and 'fold 0: last' not in out and '2/2 folds, 0:00:00 left' in out
    assert (tmp_path / 'fold_0/metrics.jsonl').stat().st_mtime_ns == before
    assert without_time(report_of(tmp_path)) == without_time(report_of(folder / 'run'))


def test_an_interrupted_fold_goes_on(done, tmp_path, monkeypatch):
    """Killed after the first epoch of the second fold: that fold continues, and ends as it would have."""
    folder, path = done
    epochs = []

    class Dying(Runner):
        def call_hook(self, stage, **kwargs):
            super().call_hook(stage, **kwargs)
            if stage == 'after_train_epoch':
                epochs.append(Path(self.work_dir).name)
                if epochs == ['fold_0', 'fold_0', 'fold_1']:
                    raise KeyboardInterrupt
    monkeypatch.setattr(fewshot, 'Runner', Dying)
    assert run(path, '--way', 2, '--folds', 2, '--work-dir', tmp_path) == 130
    assert len(report_of(tmp_path)['folds']) == 1
    assert run(path, '--way', 2, '--folds', 2, '--work-dir', tmp_path) == 0
    assert epochs == ['fold_0', 'fold_0', 'fold_1', 'fold_1']
    assert without_time(report_of(tmp_path)) == without_time(report_of(folder / 'run'))


def fails(capsys, *argv) -> str:
    capsys.readouterr()
    assert run(*argv) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize('change', [['--shot', '3'], ['--seed', '1'], ['--way', '3'],
                                    ['--cfg-options', 'optim_wrapper.optimizer.lr=0.1']])
def test_results_of_other_settings_are_not_mixed(done, capsys, change):
    folder, path = done
    before = report_of(folder / 'run')
    error = fails(capsys, path, '--way', '2', '--work-dir', folder / 'run', *change)
    assert 'other settings' in error and 'fewshot.json' in error and report_of(folder / 'run') == before


@pytest.mark.parametrize('text', ['', '[]', '{"settings": {}}', '{"settings": {}, "folds": [{}]}', '{"settings": 1'])
def test_a_broken_report(done, tmp_path, capsys, text):
    _, path = done
    (tmp_path / 'fewshot.json').write_text(text)
    assert 'is no report of few-shot folds' in fails(capsys, path, '--work-dir', tmp_path)
    assert (tmp_path / 'fewshot.json').read_text() == text


def test_mistakes(done, tmp_path, capsys):
    _, path = done
    assert 'way must be at least 2' in fails(capsys, path, '--way', 1, '--work-dir', tmp_path)
    assert 'folds must be at least 1' in fails(capsys, path, '--folds', 0, '--work-dir', tmp_path)
    assert 'does not exist' in fails(capsys, tmp_path / 'no.py')
    assert 'nowhere.pth does not exist' in fails(capsys, path, '--pretrained', 'nowhere.pth', '--work-dir', tmp_path)
    toys = toy_config('x')
    del toys['work_dir']
    toys = write_config(tmp_path / 'toys.py', toys)
    assert 'needs a config with FewShot data' in fails(capsys, toys, '--work-dir', tmp_path / 'toys')
    error = fails(capsys, path, '--work-dir', tmp_path / 'b', '--cfg-options', 'val_dataloader.dataset.shot=3')
    assert 'different tasks' in error
    error = fails(capsys, path, '--way', 14, '--work-dir', tmp_path / 'c')
    assert 'way=14 classes' in error and '13 of 13' in error


def test_the_default_work_dir_names_the_task(done, tmp_path, monkeypatch):
    _, path = done
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fewshot, 'run_fold', lambda cfg, work_dir, fold: dict(
        fold=fold, last=50.0, best=60.0, best_epoch=1, seconds=0.0))
    assert run(path, '--way', 2, '--shot', 5) == 0
    assert len(report_of(tmp_path / 'work_dirs/few_2way_5shot')['folds']) == 10
    assert run(path) == 0
    assert (tmp_path / 'work_dirs/few_3way_4shot/fewshot.json').is_file()


def test_several_tasks_by_one_command(done, tmp_path, monkeypatch, capsys):
    _, path = done
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fewshot, 'run_fold', lambda cfg, work_dir, fold: dict(
        fold=fold, last=10.0 * cfg.train_dataloader.dataset.way, best=60.0 + fold, best_epoch=1, seconds=0.0))
    grid = ['--way', 2, 3, '--shot', 1, 2, '--folds', 2]
    for root, argv in ((tmp_path / 'grid', ['--work-dir', 'grid']), (tmp_path / 'work_dirs', [])):
        capsys.readouterr()
        assert run(path, *grid, *argv) == 0
        out = capsys.readouterr().out
        for way, shot in ((2, 1), (2, 2), (3, 1), (3, 2)):
            name = f'{way}way_{shot}shot'
            report = report_of(root / (name if argv else f'few_{name}'))
            assert (report['settings']['way'], report['settings']['shot']) == (way, shot)
            assert report['last']['mean'] == 10 * way and report['best']['mean'] == 60.5
            assert f'{way}-way {shot}-shot, 2 folds' in out
    assert 'way must be at least 2' in fails(capsys, path, '--way', 2, 1, '--work-dir', tmp_path / 'bad')
    assert not (tmp_path / 'bad').exists()  # before the first task is begun


def test_a_missing_fold_is_missed_before_the_first_is_trained_on(tmp_path, capsys, monkeypatch):
    for fold in (0, 2):
        file = tmp_path / f'data/3way4shot/{fold}.pkl'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b'')
    monkeypatch.setattr(fewshot, 'run_fold', None)
    cfg = Config.fromfile(config(tmp_path))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset = dict(type='FewShot', data_root=str(tmp_path / 'data'), way=3, shot=4,
                                                  split='train' if split == 'train' else 'test', pipeline=PIPELINE)
    with pytest.raises(FileNotFoundError, match=r'3way_4shot/1\.pkl'):
        fewshot.run_folds(cfg, tmp_path / 'run', folds=3)
    assert not (tmp_path / 'run').exists()


def test_folds_that_were_begun_without_a_report(done, tmp_path, capsys):
    _, path = done
    (tmp_path / 'fold_3').mkdir()
    (tmp_path / 'fold_3/last_checkpoint').write_text('epoch_1.pth')
    error = fails(capsys, path, '--work-dir', tmp_path)
    assert 'fold_3' in error and 'with which settings' in error


def test_stopped_between_the_training_and_the_report(done, tmp_path, monkeypatch):
    folder, path = done
    calls = []

    def write_report(work_dir, report):
        calls.append(len(report['folds']))
        if calls == [0, 1]:
            raise KeyboardInterrupt
        original(work_dir, report)
    original = fewshot.write_report
    monkeypatch.setattr(fewshot, 'write_report', write_report)
    assert run(path, '--way', 2, '--folds', 2, '--work-dir', tmp_path) == 130
    assert (tmp_path / 'fold_0/epoch_2.pth').is_file() and not report_of(tmp_path)['folds']
    assert run(path, '--way', 2, '--folds', 2, '--work-dir', tmp_path) == 0
    assert without_time(report_of(tmp_path)) == without_time(report_of(folder / 'run'))


def test_accuracies_of_a_run(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    lines = [dict(mode='train', epoch=1, loss=1), dict(mode='val', epoch=1, OA=50), dict(mode='val', epoch=2, OA=70),
             dict(mode='val', epoch=4, OA=70), dict(mode='val', epoch=6, OA=60)]
    path.write_text('\n'.join(map(json.dumps, lines)))
    accuracies = fewshot.read_accuracies(path)
    assert accuracies == {1: 50, 2: 70, 4: 70, 6: 60} and max(accuracies, key=accuracies.get) == 2
    path.write_text(json.dumps(dict(mode='val', epoch=1, mIoU=3)))
    with pytest.raises(KeyError, match=r"reported by 'OA'.*mIoU"):
        fewshot.read_accuracies(path)


def test_a_config_without_validation_is_tested_at_the_end(tmp_path):
    cfg = Config.fromfile(config(tmp_path, val_cfg=None, val_evaluator=None))
    cfg.val_dataloader = None
    report = fewshot.run_folds(cfg, tmp_path / 'run', folds=1)
    assert report['folds'][0]['evaluations'] == 1 and report['folds'][0]['last'] == report['folds'][0]['best']
