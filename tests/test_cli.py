"""The commands: train, test, fuse, from end to end, and with hostile files."""
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_toys import configs, fails, trained_folder
from engine_toys import on_cpu, same, toy_config, write_config  # noqa: F401

from ewa3d import build, cli, fusing
from ewa3d.engine.checkpoint import read_checkpoint, write_checkpoint
from ewa3d.engine.provenance import describe_data
from ewa3d.registry import DATASETS, MODELS

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    return trained_folder(tmp_path_factory.mktemp('cli'))


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


# ---- what fuse looks at ----------------------------------------------------------------------------------------------
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
    found = describe_data(dict(dataset=dataset), DATASETS.build(dataset))
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

    monkeypatch.setattr('ewa3d.cli.options.load_config', lambda *args: interrupted(args))
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


def test_weights_that_a_run_started_from_may_be_gone(trained, tmp_path):
    """Testing, resuming and fusing read the checkpoint alone."""
    start = tmp_path / 'start.pth'
    shutil.copy(trained / 'run' / 'epoch_1.pth', start)
    cfg = toy_config('x', ewa=True, epochs=1)
    del cfg['work_dir']
    cfg['model']['pretrained'] = str(start)
    config = str(write_config(tmp_path / 'ft.py', cfg))
    assert cli.main(['train', config, '--work-dir', str(tmp_path / 'ft')]) == 0
    start.unlink()
    checkpoint = str(tmp_path / 'ft' / 'epoch_1.pth')
    assert cli.main(['test', config, checkpoint, '--work-dir', str(tmp_path / 'test')]) == 0
    assert cli.main(['fuse', checkpoint, str(tmp_path / 'plain.pth'), '--config', config]) == 0
    assert cli.main(['train', config, '--work-dir', str(tmp_path / 'ft'), '--resume', '--cfg-options',
                     'train_cfg.max_epochs=2']) == 0
    assert cli.main(['train', config, '--work-dir', str(tmp_path / 'new')]) == 2
