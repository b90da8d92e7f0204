"""What the commands say about mistakes: one line each, exit code 2, and nothing begun."""
import json
from pathlib import Path

import pytest
import torch
from cli_toys import configs, fails, trained_folder
from engine_toys import on_cpu, toy_config, write_config  # noqa: F401

from ewa3d import cli, fusing


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return trained_folder(tmp_path_factory.mktemp('cli'))


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
    ('a.b=dict(c=1,d=2)', '--cfg-options a.b=dict(c=1,d=2): values are words, numbers, [lists] and (tuples)'),
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
