"""The commands: train, test, fuse, from end to end, and what they say about mistakes."""
import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_toys import on_cpu, same, toy_config, write_config  # noqa: F401
from mmengine.config import Config

from ewa3d import build, cli, fusing
from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
from ewa3d.registry import DATASETS, MODELS

REPO = Path(__file__).resolve().parents[1]


def configs(folder: Path, **options) -> tuple[str, str]:
    """An EWA config and its plain twin, as files."""
    paths = []
    for name, ewa in (('ewa', True), ('plain', False)):
        cfg = toy_config('x', ewa=ewa, epochs=1, **options)
        del cfg['work_dir']
        paths.append(str(write_config(folder / f'{name}.py', cfg)))
    return tuple(paths)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with ``ewa.py``, ``plain.py`` and the work dir ``run`` of the first, trained with EMA."""
    folder = tmp_path_factory.mktemp('cli')
    ewa, _ = configs(folder, ema=True)
    assert cli.main(['train', ewa, '--work-dir', str(folder / 'run')]) == 0
    return folder


def fails(capsys, *argv: str) -> str:
    """The one line that a mistake gives."""
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1, error
    return error


# ---- from end to end -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('weights', ['default', 'raw'])
def test_train_test_fuse_test(trained, tmp_path, capsys, suffix, weights):
    checkpoint, out = str(trained / 'run' / 'epoch_1.pth'), str(tmp_path / 'new' / f'fused.{suffix}')
    assert cli.main(['fuse', checkpoint, out, '--weights', weights]) == 0
    text = capsys.readouterr().out
    assert 'EWAFFN' in text and 'difference in float32' in text and f'wrote {out}' in text
    results = []
    for name, path, extra in (('ewa', checkpoint, ['--weights', weights]), ('plain', out, [])):
        folder = tmp_path / name
        assert cli.main(['test', str(trained / f'{name}.py'), path, '--work-dir', str(folder), *extra]) == 0
        assert 'OA' in capsys.readouterr().out
        results.append(json.loads((folder / 'metrics.json').read_text()))
    expanded, fused = results
    assert expanded.pop('config') != fused.pop('config') and expanded.pop('checkpoint') != fused.pop('checkpoint')
    assert expanded == fused
    assert fused['dataset'] == 'ToyClouds' and fused['split'] == 'test' and fused['samples'] == 9
    assert fused['points'] == 48 and fused['seed'] == 0 and fused['weights'] == ('raw' if weights == 'raw' else 'ema')
    assert all(isinstance(v, (int, float, str)) for v in fused.values()) and 0 <= fused['mAcc'] <= 100


def test_the_fused_file_is_plain(trained, tmp_path):
    out = tmp_path / 'fused.pth'
    assert cli.main(['fuse', str(trained / 'run' / 'epoch_1.pth'), str(out)]) == 0
    fused = read_checkpoint(out)
    cfg = fused['meta']['cfg']
    assert 'expand' not in cfg['model'] and 'ewa' not in cfg['default_hooks']
    assert not {'optimizer', 'rng', 'ema_state_dict'} & fused.keys()
    assert fused['meta']['fused']['modules'] == 2 and fused['meta']['epoch'] == 1
    plain = MODELS.build(cfg['model'])
    assert set(plain.state_dict()) == set(fused['state_dict'])
    again = tmp_path / 'again.pth'
    assert cli.main(['fuse', str(out), str(again)]) == 0  # nothing to fuse, written all the same
    assert same(read_checkpoint(again)['state_dict'], fused['state_dict'])


def test_tools_and_synthetic_shapes(tmp_path):
    """The scripts themselves, on the embedded data set: other weights than before, and the same numbers fused."""
    cfg = toy_config('x', ewa=True, epochs=1)
    del cfg['work_dir']
    pipeline = [dict(type='Normalize'), dict(type='Resample', num_points=64, method='random'), dict(type='Pack')]
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader']['dataset'] = dict(type='SyntheticShapes', num_samples=16, num_points=128,
                                                     split='train' if split == 'train' else 'test', pipeline=pipeline)
    config = write_config(tmp_path / 'c.py', cfg)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(REPO), str(REPO / 'tests')]), OMP_NUM_THREADS='1',
               CUDA_VISIBLE_DEVICES='')

    def tool(name, *argv):
        done = subprocess.run([sys.executable, str(REPO / 'tools' / f'{name}.py'), *map(str, argv)], env=env,
                              cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tool('train', config, '--seed', 3, '--cfg-options', 'optim_wrapper.optimizer.lr=0.01')
    run = tmp_path / 'work_dirs' / 'c'
    assert read_checkpoint(run / 'epoch_1.pth')['meta']['seed'] == 3
    assert 'refused' not in tool('fuse', run / 'epoch_1.pth', 'f.pth')
    assert 'OA' in tool('test', config, 'work_dirs/c/epoch_1.pth', '--work-dir', 'e')
    assert json.loads((tmp_path / 'e' / 'metrics.json').read_text())['points'] == 64


def test_the_dumped_config_is_a_config(trained, tmp_path):
    config = trained / 'run' / 'config.py'
    assert cli.main(['train', str(config), '--work-dir', str(tmp_path)]) == 0
    assert same(read_checkpoint(tmp_path / 'epoch_1.pth')['state_dict'],
                read_checkpoint(trained / 'run' / 'epoch_1.pth')['state_dict'])


def test_print_config(trained, capsys):
    capsys.readouterr()
    assert cli.main(['train', str(trained / 'ewa.py'), '--print-config', '--amp', '--seed', '7',
                     '--cfg-options', 'train_cfg.max_epochs=9']) == 0
    text = capsys.readouterr().out
    assert 'num_classes=3' in text and 'max_epochs=9' in text and 'AutocastOptimWrapper' in text and 'seed=7' in text


def test_resume_keeps_the_seed(tmp_path):
    _, plain = configs(tmp_path)
    run = ['train', plain, '--work-dir', str(tmp_path / 'run')]
    assert cli.main([*run, '--seed', '5']) == 0
    assert cli.main([*run, '--resume', '--cfg-options', 'train_cfg.max_epochs=2']) == 0
    assert read_checkpoint(tmp_path / 'run' / 'epoch_2.pth')['meta']['seed'] == 5
    assert cli.main([*run, '--resume', str(tmp_path / 'run' / 'epoch_1.pth')]) == 0


def test_amp(tmp_path):
    ewa, _ = configs(tmp_path)
    assert cli.main(['train', ewa, '--work-dir', str(tmp_path / 'run'), '--amp']) == 0
    cfg = read_checkpoint(tmp_path / 'run' / 'epoch_1.pth')['meta']['cfg']
    assert cfg['optim_wrapper']['type'] == 'AutocastOptimWrapper'


def test_official_weights_are_taken_too(trained, tmp_path):
    """A plain state dict without any of our keys."""
    fused = tmp_path / 'f.pth'
    cli.main(['fuse', str(trained / 'run' / 'epoch_1.pth'), str(fused)])
    torch.save(dict(base_model={f'module.{k}': v for k, v in read_checkpoint(fused)['state_dict'].items()}),
               tmp_path / 'foreign.pth')
    assert cli.main(['test', str(trained / 'plain.py'), str(tmp_path / 'foreign.pth'), '--work-dir',
                     str(tmp_path / 'w')]) == 0


# ---- mistakes --------------------------------------------------------------------------------------------------------
def test_mistakes_in_train(trained, tmp_path, capsys):
    plain, work = str(trained / 'plain.py'), ['--work-dir', str(tmp_path / 'w')]
    assert 'nothing.py' in fails(capsys, 'train', 'nothing.py')
    (tmp_path / 'notes.md').write_text('# none\n')
    assert "notes.md: a config ends in .py, .yml, .yaml, .json, got '.md'" in fails(capsys, 'train',
                                                                                   str(tmp_path / 'notes.md'))
    (tmp_path / 'broken.py').write_text('model = dict(\n')
    assert 'broken.py' in fails(capsys, 'train', str(tmp_path / 'broken.py'))
    (tmp_path / 'raising.py').write_text('model = 1 / 0\n')
    assert 'ZeroDivisionError' in fails(capsys, 'train', str(tmp_path / 'raising.py'))
    option = lambda text: fails(capsys, 'train', plain, *work, '--cfg-options', text)  # noqa: E731
    assert "'train_cfg'" in option('trian_cfg.max_epochs=1')
    assert "'max_epochs'" in option('train_cfg.max_epoch=1')
    assert "model.backbone" in option('model.backbone.depht=1')
    assert "'ToyClouds'" in option('train_dataloader.dataset.type=ToyCloud')
    assert 'no such checkpoint' in fails(capsys, 'train', plain, *work, '--resume', str(tmp_path / 'x.pth'))
    assert not (tmp_path / 'w').exists()  # nothing was begun
    with pytest.raises(KeyError):
        cli.main(['train', plain, *work, '--debug', '--cfg-options', 'model.type=X'])


@pytest.mark.parametrize(('option', 'expected'), [
    ('env_cfg.cudnn_benchmrk=True', "env_cfg takes no 'cudnn_benchmrk'; did you mean 'cudnn_benchmark'"),
    ('env_cfg.mp_cfg.mp_start=fork', "env_cfg.mp_cfg takes no 'mp_start'; did you mean 'mp_start_method'"),
    ('compile.mod=default', "compile takes no 'mod'; did you mean 'mode'"),
    ('log_processor.windw_size=5', "log_processor takes no 'windw_size'; did you mean 'window_size'"),
    ('visualizer.type=Visualiser', "visualizer: 'Visualiser'"),
    ('randomness.sede=4', "randomness takes no 'sede'; did you mean 'seed'"),
    ('optim_wrapper.clip_grad.max_nrm=1', "optim_wrapper.clip_grad takes no 'max_nrm'; did you mean 'max_norm'"),
    ('optim_wrapper.paramwise_cfg.bias_lr_mlt=2', "optim_wrapper.paramwise_cfg takes no 'bias_lr_mlt'"),
    ('model.expand.0.num_expert=4', "model.expand[0] takes no 'num_expert'; did you mean 'num_experts'"),
    ('model.expand.0.evry=2', "model.expand[0] takes no 'evry'; did you mean 'every'"),
    ('model.expand.0.num_experts=abc', "model.expand[0].num_experts is 'abc'; an integer was expected"),
    ('train_cfg.val_interval=0', 'train_cfg.val_interval is 0; a positive integer was expected'),
    ('train_cfg.max_epochs=0', 'train_cfg.max_epochs is 0; a positive integer was expected'),
    ('train_cfg.max_epochs=abc', "train_cfg.max_epochs is 'abc'; a positive integer was expected"),
    ('optim_wrapper.accumulative_counts=0', 'optim_wrapper.accumulative_counts is 0; a positive integer'),
    ('optim_wrapper.optimizer.lr=abc', "optim_wrapper.optimizer.lr is 'abc'; a number"),
    ('optim_wrapper.optimizer.lr=-1', 'optim_wrapper.optimizer.lr is -1; a number from 0 on'),
    ('model.backbone.depth=abc', "model.backbone.depth is 'abc'; an integer was expected"),
    ('model.backbone.depth=1.5', 'model.backbone.depth is 1.5; an integer was expected'),
    ('train_dataloader.batch_size=0', 'train_dataloader.batch_size is 0; a positive integer'),
    ('default_hooks.checkpoint.interval=0', 'default_hooks.checkpoint.interval is 0; a positive integer'),
    ('model=3', 'model is 3; a dict was expected'),
    ('model.backbone=3', 'model.backbone is 3; a dict or a module was expected'),
    ('model.expand=3', 'model.expand is 3; a dict or a list was expected'),
    ('model.expand=EWAFFN', "model.expand is 'EWAFFN'; a dict or a list was expected"),
    ('model.expand=[EWAFFN]', "model.expand[0] is 'EWAFFN'; a dict was expected"),
    ('model.expand.x=8', "--cfg-options model.expand.x: model.expand is a list of 1; the index of one of them"),
    ('model.expand.1.num_experts=8', "--cfg-options model.expand.1.num_experts: model.expand is a list of 1; the"),
    ('model.type.x=8', "--cfg-options model.type.x: model.type is 'TaskModel', of which no part 'x' can be set"),
    ('default_hooks=3', 'default_hooks is 3; a dict was expected'),
    ('default_hooks.ewa=3', 'default_hooks.ewa is 3; a dict was expected'),
    ('custom_hooks=EMAHook', "custom_hooks is 'EMAHook'; a list was expected"),
    ('val_evaluator=3', 'val_evaluator is 3; a dict or a list was expected'),
    ('optim_wrapper=3', 'optim_wrapper is 3; a dict was expected'),
    ('optim_wrapper.optimizer=Adam', "optim_wrapper.optimizer is 'Adam'; a dict was expected"),
    ('optim_wrapper.clip_grad=3', 'optim_wrapper.clip_grad is 3; a dict or None was expected'),
    ('param_scheduler=[3]', 'param_scheduler[0] is 3; a dict was expected'),
    ('randomness=3', 'randomness is 3; a dict was expected'),
    ('visualizer=3', 'visualizer is 3; a dict was expected'),
    ('train_cfg=3', 'train_cfg is 3; a dict was expected'),
    ('train_dataloader=3', 'train_dataloader is 3; a dict was expected'),
    ('train_dataloader.dataset=3', 'train_dataloader.dataset is 3; a dict was expected'),
    ('train_dataloader.dataset.pipeline=3', "train_dataloader.dataset: ToyClouds takes no 'pipeline'"),
    ('custom_hooks.0.type=EMAHook', "the config has no list custom_hooks of which an entry could be changed; write "
     "custom_hooks=[dict(type='…')] into the config, or give the hook a name: default_hooks.NAME.type=…"),
    ('visualizer.vis_backends.0.type=TensorboardVisBackend', 'the config has no list visualizer.vis_backends of which '
     "an entry could be changed; write visualizer=dict(vis_backends=[dict(type='…')]) into the config"),
    ('model', '--cfg-options model: key=value was expected'),
    ('a.b=[1,2', '--cfg-options a.b=[1,2: the brackets'),
])
def test_wrong_keys_and_values_are_found_before_anything_is_built(trained, capsys, option, expected):
    assert expected in fails(capsys, 'train', str(trained / 'ewa.py'), '--print-config', '--cfg-options', option)


def test_a_named_hook_and_two_options_that_do_not_go_together(trained, capsys):
    assert cli.main(['train', str(trained / 'ewa.py'), '--print-config', '--cfg-options',
                     'default_hooks.mine.type=EMAHook']) == 0
    assert "mine=dict(type='EMAHook')" in capsys.readouterr().out
    assert '--cfg-options load_from load_from.x: ' in fails(
        capsys, 'train', str(trained / 'ewa.py'), '--print-config', '--cfg-options', 'load_from=a', 'load_from.x=2')


def test_what_this_machine_lacks(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('ewa3d.engine.environment.get_device', lambda: 'cpu')
    monkeypatch.delenv('SLURM_PROCID', raising=False)
    train = ['train', str(trained / 'plain.py'), '--work-dir', str(tmp_path / 'w')]
    error = fails(capsys, *train, '--cfg-options', 'optim_wrapper.type=AmpOptimWrapper')
    assert "'AutocastOptimWrapper'" in error and '--amp' in error and not (tmp_path / 'w').exists()
    assert 'lacks SLURM_PROCID' in fails(capsys, *train, '--launcher', 'slurm')


@pytest.mark.parametrize(('name', 'nearest'), [('OAA', "'OA'"), ('acc/roundd', "'acc/round'")])
def test_a_metric_that_there_is_not_is_found_before_training(trained, tmp_path, capsys, name, nearest):
    error = fails(capsys, 'train', str(trained / 'plain.py'), '--work-dir', str(tmp_path / 'w'), '--cfg-options',
                  f'default_hooks.checkpoint.save_best={name}')
    assert f'save_best={name!r}' in error and nearest in error and not (tmp_path / 'w').exists()


def test_paramwise_keys_of_our_constructor(trained, capsys):
    error = fails(capsys, 'train', str(trained / 'ewa.py'), '--print-config', '--cfg-options',
                  'optim_wrapper.constructor=ParamGroups', 'optim_wrapper.paramwise_cfg.expert_lr_mlt=2')
    assert "optim_wrapper.paramwise_cfg takes no 'expert_lr_mlt'; did you mean 'expert_lr_mult'" in error


def test_one_sample_and_batch_norm(trained, tmp_path, capsys):
    error = fails(capsys, 'train', str(trained / 'plain.py'), '--work-dir', str(tmp_path), '--cfg-options',
                  'train_dataloader.batch_size=1')
    assert 'train_dataloader.batch_size is 1' in error and 'at least 2 samples' in error


def test_configs_for_one_purpose(trained, tmp_path, capsys):
    """Testing needs nothing of training; training says what it lacks; a missing base file is named."""
    cfg = toy_config('x', ewa=True)
    for key in ('work_dir', 'train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader',
                'val_cfg', 'val_evaluator', 'default_hooks'):
        del cfg[key]
    config = str(write_config(tmp_path / 'test_only.py', cfg))
    checkpoint = str(trained / 'run' / 'epoch_1.pth')
    assert cli.main(['test', config, checkpoint, '--work-dir', str(tmp_path / 'w')]) == 0
    assert json.loads((tmp_path / 'w' / 'metrics.json').read_text())['split'] == 'test'
    assert (tmp_path / 'w' / 'test.log').is_file() and not (tmp_path / 'w' / 'train.log').exists()
    assert "has no 'train_dataloader', which training needs" in fails(capsys, 'train', config)
    cfg = toy_config('x')
    del cfg['train_cfg']
    config = str(write_config(tmp_path / 'no_loop.py', cfg))
    assert "has no 'train_cfg', which training needs" in fails(capsys, 'train', config)
    (tmp_path / 'child.py').write_text("_base_ = 'nowhere.py'\n")
    error = fails(capsys, 'train', str(tmp_path / 'child.py'))
    assert 'child.py' in error and 'nowhere.py' in error


def test_an_unexpected_error_is_not_a_refusal(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError('a bug')

    monkeypatch.setattr(fusing, 'fuse_checkpoint', broken)
    assert cli.main(['fuse', 'a.pth', 'b.pth']) == 3
    assert 'Traceback' in capsys.readouterr().err


def test_the_quickstart_is_a_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['quickstart', '--help'])
    assert stop.value.code == 0 and '--threads' in capsys.readouterr().out


def test_a_data_worker_error_is_one_line(tmp_path, capsys):
    _, plain = configs(tmp_path, workers=1)
    error = fails(capsys, 'train', plain, '--work-dir', str(tmp_path / 'w'),
                  '--cfg-options', 'train_dataloader.dataset.num_points=-1')
    assert 'negative dimensions' in error and 'Traceback' not in error
    assert 'Traceback' in (tmp_path / 'w' / 'train.log').read_text()


def test_mistakes_in_test(trained, tmp_path, capsys):
    checkpoint, work = str(trained / 'run' / 'epoch_1.pth'), ['--work-dir', str(tmp_path)]
    assert 'does not exist' in fails(capsys, 'test', str(trained / 'ewa.py'), 'nothing.pth', *work)
    assert 'fuse it with tools/fuse.py' in fails(capsys, 'test', str(trained / 'plain.py'), checkpoint, *work)
    error = fails(capsys, 'test', str(trained / 'ewa.py'), checkpoint, *work, '--cfg-options',
                  'test_dataloader.dataset.classes=[a,b]')
    assert '3 in the checkpoint, 2 in the model' in error
    error = fails(capsys, 'test', str(trained / 'ewa.py'), checkpoint, *work, '--cfg-options',
                  'test_dataloader.dataset.classes=[round,flat,long]')
    assert 'another order' in error
    error = fails(capsys, 'test', str(trained / 'ewa.py'), checkpoint, *work, '--cfg-options', 'model.backbone.depth=3')
    assert 'missing' in error
    assert not (tmp_path / 'metrics.json').exists()


def test_mistakes_in_fuse(trained, tmp_path, capsys):
    checkpoint = str(trained / 'run' / 'epoch_1.pth')
    before = Path(checkpoint).read_bytes()
    assert '.safetensors' in fails(capsys, 'fuse', checkpoint, str(tmp_path / 'out.onnx'))
    assert 'is the checkpoint itself' in fails(capsys, 'fuse', checkpoint, str(trained / 'run' / '..' / 'run' /
                                                                               'epoch_1.pth'))
    (tmp_path / 'folder.pth').mkdir()
    assert 'folder' in fails(capsys, 'fuse', checkpoint, str(tmp_path / 'folder.pth'))
    assert 'does not exist' in fails(capsys, 'fuse', 'nothing.pth', str(tmp_path / 'out.pth'))
    torch.save(dict(a=torch.ones(2)), tmp_path / 'plain.pth')
    assert '--config' in fails(capsys, 'fuse', str(tmp_path / 'plain.pth'), str(tmp_path / 'out.pth'))
    assert Path(checkpoint).read_bytes() == before and not (tmp_path / 'out.pth').exists()


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_weights_without_a_config_tell_the_number_of_classes(trained, tmp_path, suffix):
    content = read_checkpoint(trained / 'run' / 'epoch_1.pth')
    bare = tmp_path / f'bare.{suffix}'
    if suffix == 'pth':
        torch.save(content['state_dict'], bare)
    else:
        write_checkpoint(bare, content['state_dict'])
    out = str(tmp_path / 'out.pth')
    assert cli.main(['fuse', str(bare), out, '--config', str(trained / 'ewa.py')]) == 0
    assert build(str(trained / 'plain.py'), out).head.num_classes == 3
    assert build(str(trained / 'ewa.py'), bare).head.num_classes == 3


def test_the_folder_is_part_of_the_data_sets_name(tmp_path):
    (tmp_path / 'mine' / 'a').mkdir(parents=True)
    np.savetxt(tmp_path / 'mine' / 'a' / 'x.txt', np.random.rand(8, 3))
    dataset = dict(type='FolderPointCloud', data_root=str(tmp_path / 'mine'), split=None, cache_dir=None, classes=['a'],
                   pipeline=[dict(type='Pack')])
    found = cli._describe_data(Config(dict(test_dataloader=dict(dataset=dataset))), DATASETS.build(dataset))
    assert found['dataset'] == 'FolderPointCloud mine' and found['samples'] == 1


def test_a_difference_is_refused(trained, tmp_path, capsys, monkeypatch):
    def wrong(model):
        from ewa3d.reparam import fuse
        report = fuse(model)
        with torch.no_grad():
            model.backbone.blocks[0].mlp.fc1.weight.mul_(1.1)
        return report

    monkeypatch.setattr(fusing, 'fuse', wrong)
    out = tmp_path / 'out.pth'
    assert cli.main(['fuse', str(trained / 'run' / 'epoch_1.pth'), str(out)]) == 1
    assert 'refused to write' in capsys.readouterr().out and not out.exists()


def test_not_a_number_is_refused(trained, tmp_path):
    content = read_checkpoint(trained / 'run' / 'epoch_1.pth')
    content['state_dict']['backbone.norm.weight'][0] = float('nan')
    bad = write_checkpoint(tmp_path / 'bad.pth', content['state_dict'], content['meta'])
    assert cli.main(['fuse', str(bad), str(tmp_path / 'out.pth')]) == 1
    assert not (tmp_path / 'out.pth').exists()


def test_the_model_is_fused_in_double_for_the_double_line(trained, tmp_path):
    report = fusing.fuse_checkpoint(trained / 'run' / 'epoch_1.pth', tmp_path / 'out.pth')
    assert report.difference['float64']['relative'] < 1e-13
    assert all(v.dtype != torch.float64 for v in read_checkpoint(tmp_path / 'out.pth')['state_dict'].values())


# ---- hostile ---------------------------------------------------------------------------------------------------------
class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch {self.marker}',)


def test_hostile_pickles_are_refused_by_every_command(trained, tmp_path, capsys):
    marker, evil = tmp_path / 'marker', str(tmp_path / 'evil.pth')
    torch.save(dict(state_dict={}, meta=Evil(marker), optimizer={}), evil)
    (tmp_path / 'raw.pth').write_bytes(pickle.dumps(Evil(marker)))
    ewa, work = str(trained / 'ewa.py'), ['--work-dir', str(tmp_path / 'w')]
    assert 'system' in fails(capsys, 'fuse', evil, str(tmp_path / 'out.pth'))
    fails(capsys, 'fuse', str(tmp_path / 'raw.pth'), str(tmp_path / 'out.pth'))
    assert 'system' in fails(capsys, 'test', ewa, evil, *work)
    assert 'system' in fails(capsys, 'train', ewa, *work, '--resume', evil)
    assert 'system' in fails(capsys, 'train', ewa, *work, '--cfg-options', f'load_from={evil}')
    assert not marker.exists() and not (tmp_path / 'out.pth').exists()


def test_hostile_configs_are_refused(trained, tmp_path, capsys):
    content = read_checkpoint(trained / 'run' / 'epoch_1.pth')
    marker = tmp_path / 'marker'
    module = tmp_path / 'evil_module.py'
    module.write_text(f'open({str(marker)!r}, "w").close()\n')
    sys.path.insert(0, str(tmp_path))
    code = f'__import__("os").system("touch {marker}")'
    try:
        for change in (dict(type='os.system', command=f'touch {marker}'), dict(type='builtins.eval', source=code),
                       dict(type='evil_module.X'), dict(type='subprocess.run'), dict(type='eval'),
                       dict(_scope_='evil_module'), dict(custom_imports=dict(imports=['evil_module'])),
                       dict(_base_=str(module)), dict(type='torch.nn.Linear', in_features=1, out_features=1)):
            meta = copy.deepcopy(content['meta'])
            meta['cfg']['model']['head'].update(change)
            bad = write_checkpoint(tmp_path / 'bad.pth', content['state_dict'], meta)
            fails(capsys, 'fuse', str(bad), str(tmp_path / 'out.pth'))
        for cfg in (code, f'model = {code}', dict(custom_imports=dict(imports=['evil_module']), model=code)):
            bad = write_checkpoint(tmp_path / 'bad.pth', content['state_dict'], dict(content['meta'], cfg=cfg))
            assert '--config' in fails(capsys, 'fuse', str(bad), str(tmp_path / 'out.pth'))
    finally:
        sys.path.remove(str(tmp_path))
    assert not marker.exists() and 'evil_module' not in sys.modules and not (tmp_path / 'out.pth').exists()


def test_unbuildable_configs_are_named(trained, tmp_path, capsys):
    content = read_checkpoint(trained / 'run' / 'epoch_1.pth')
    for change in (dict(depth='abc'), dict(depth=-1), dict(num_heads=0), dict(tokenizer=3), dict(embed_dim=10**30),
                   dict(type='TokenEncodr'), dict(depht=2)):
        meta = copy.deepcopy(content['meta'])
        meta['cfg']['model']['backbone'].update(change)
        bad = write_checkpoint(tmp_path / 'bad.pth', content['state_dict'], meta)
        error = fails(capsys, 'fuse', str(bad), str(tmp_path / 'out.pth'))
        assert 'bad.pth' in error and not (tmp_path / 'out.pth').exists()


def test_trusted_part():
    cfg = dict(type='TaskModel', pretrained='/etc/passwd', backbone=dict(type='ewa3d.TokenEncoder', depth=2,
               init_cfg=dict(type='Pretrained', checkpoint='x')), layers=[dict(type='Linear', checkpoint='y')])
    assert fusing.trusted_part(cfg) == dict(type='TaskModel', backbone=dict(type='ewa3d.TokenEncoder', depth=2),
                                     layers=[dict(type='Linear')])
    for name in ('os.system', 'builtins.eval', 'torch.hub.load', 'ewa3d.models.TaskModel', 'a b', '', 3, ['eval']):
        with pytest.raises(ValueError, match='only names that are registered'):
            fusing.trusted_part(dict(type='TaskModel', head=dict(type=name)))
    for key in ('custom_imports', '_base_', '_scope_'):
        with pytest.raises(ValueError, match=key):
            fusing.trusted_part(dict(type='TaskModel', head=[{key: 'evil'}]))


def test_files_named_in_a_stored_config_are_not_read(trained, tmp_path, capsys):
    content = read_checkpoint(trained / 'run' / 'epoch_1.pth')
    meta = copy.deepcopy(content['meta'])
    meta['cfg']['model']['pretrained'] = '/etc/passwd'
    meta['cfg']['test_dataloader']['dataset'].update(type='ModelNet', data_root='/etc', cache_dir=str(tmp_path / 'c'))
    odd = write_checkpoint(tmp_path / 'odd.pth', content['state_dict'], meta)
    assert cli.main(['fuse', str(odd), str(tmp_path / 'out.pth')]) == 0
    assert 'pretrained' not in read_checkpoint(tmp_path / 'out.pth')['meta']['cfg']['model']
    assert not (tmp_path / 'c').exists()


def test_custom_models_are_fused_with_a_trusted_config(trained, tmp_path, capsys):
    """A type that only the user's own module registers: the stored config is not enough, ``--config`` is."""
    (tmp_path / 'my_models.py').write_text(
        'from ewa3d.models.task import TaskModel\nfrom ewa3d.registry import MODELS\n\n\n'
        '@MODELS.register_module(force=True)\nclass MyOwnModel(TaskModel):\n    pass\n')
    cfg = toy_config('x', ewa=True, epochs=1)
    del cfg['work_dir']
    cfg['model']['type'] = 'MyOwnModel'
    write_config(tmp_path / 'mine.py', cfg)
    text = (tmp_path / 'mine.py').read_text().replace("['engine_toys']", "['engine_toys', 'my_models']")
    (tmp_path / 'mine.py').write_text(text)
    content = read_checkpoint(trained / 'run' / 'epoch_1.pth')
    meta = copy.deepcopy(content['meta'])
    meta['cfg']['model']['type'] = 'MyOwnModel'
    mine, out = write_checkpoint(tmp_path / 'mine.pth', content['state_dict'], meta), str(tmp_path / 'out.pth')
    MODELS._module_dict.pop('MyOwnModel', None)
    assert "'MyOwnModel' is not a registered model" in fails(capsys, 'fuse', str(mine), out)
    sys.path.insert(0, str(tmp_path))
    try:
        assert cli.main(['fuse', str(mine), out, '--config', str(tmp_path / 'mine.py')]) == 0
    finally:
        sys.path.remove(str(tmp_path))
        MODELS._module_dict.pop('MyOwnModel', None)
        sys.modules.pop('my_models', None)


def test_what_stays_keeps_its_rule(trained, tmp_path, monkeypatch):
    """A Reparam that has no plain form is reported as kept; the written config still expands into it."""
    from ewa3d.reparam import Reparam

    class StaysHere(Reparam):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        @classmethod
        def expand(cls, plain):
            return cls(copy.deepcopy(plain))

        def fuse(self):
            return self

        def forward(self, x):
            return self.inner(x)

    monkeypatch.setitem(MODELS._module_dict, 'StaysHere', StaysHere)
    content = read_checkpoint(trained / 'run' / 'epoch_1.pth')
    meta = copy.deepcopy(content['meta'])
    meta['cfg']['model']['expand'].append(dict(type='StaysHere', at='backbone.blocks.0.attn'))
    model = MODELS.build(meta['cfg']['model'])
    mixed = write_checkpoint(tmp_path / 'mixed.pth', model.state_dict(), meta)
    report = fusing.fuse_checkpoint(mixed, tmp_path / 'out.pth')
    assert report.written and (report.fused, report.kept) == (2, 1) and 'StaysHere' in str(report)
    cfg = read_checkpoint(tmp_path / 'out.pth')['meta']['cfg']
    assert [rule['type'] for rule in cfg['model']['expand']] == ['StaysHere']


def test_example_inputs_have_the_models_shape():
    cfg = dict(toy_config('x'), test_dataloader=dict(dataset=dict(type='X', pipeline=[dict(num_points=77)])))
    assert fusing.example_inputs(cfg)['points'].shape == (2, 77, 3)
    cfg['model']['backbone']['tokenizer']['in_channels'] = 6
    assert fusing.example_inputs(cfg)['points'].shape == (2, 77, 6)
    cfg['test_dataloader']['dataset']['pipeline'][0]['num_points'] = 10**15
    with pytest.raises(ValueError, match='clouds of'):
        fusing.example_inputs(cfg)


def test_an_interrupt_is_no_mistake(trained, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, 'load_config', lambda *args: interrupted(args))
    assert cli.main(['train', str(trained / 'ewa.py')]) == 130
    assert '--resume' in capsys.readouterr().err


def test_help(capsys):
    for argv in (['--help'], ['train', '--help'], ['test', '--help'], ['fuse', '--help'], ['convert', '--help']):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        cli.main(['train'])
    assert stop.value.code == 2
