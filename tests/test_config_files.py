"""Configs by name, and the table of commands."""
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import ewa3d
from ewa3d import cli
from ewa3d.cli.data import ACTIONS
from ewa3d.cli.errors import one_line
from ewa3d.config_files import config_root, find_config, list_configs
from ewa3d.files import check_writable

REPO = Path(__file__).resolve().parents[1]


def test_names_of_configs():
    names = list_configs()
    assert ewa3d.list_configs('*modelnet10*') == [name for name in names if 'modelnet10' in name] != []
    assert names == sorted(names) and all(find_config(name).is_file() and '_base_' not in name for name in names)
    assert 'quickstart/plain' in names and list_configs('part_seg/*') and list_configs('nothing*') == []
    assert len(names) == len([p for p in (REPO / 'configs').rglob('*.py') if '_base_' not in p.parts])


@pytest.mark.parametrize('name', ['quickstart/plain', 'quickstart/plain.py', 'configs/quickstart/plain.py', 'plain',
                                  './configs/quickstart/plain', 'plain.py', 'quickstart\\plain'])
def test_a_name_in_every_form(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == config_root() / 'quickstart' / 'plain.py'
    Path('plain').mkdir()  # a folder of the same name hides nothing
    assert find_config(name) == config_root() / 'quickstart' / 'plain.py'


def test_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('plain.py').write_text('model = dict()\n')
    assert find_config('plain.py') == Path('plain.py')


@pytest.mark.parametrize(('name', 'error', 'text'), [
    ('quickstart/plian', FileNotFoundError, "did you mean 'quickstart/plain'"), ('plian', FileNotFoundError, "'plain'"),
    ('point-mae_xs_scratch_modelnet10', FileNotFoundError, "'point-mae_xs_scratch_modelnet10-1k'"),
    ('zzzzzz', FileNotFoundError, 'ewa3d configs lists'), ('elsewhere/a.py', FileNotFoundError, 'elsewhere/a.py'),
    ('/nowhere/b.py', FileNotFoundError, 'does not exist'), ('.', IsADirectoryError, 'folder'),
])
def test_names_that_there_are_not(name, error, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=re.escape(text)):
        find_config(name)


def test_a_name_of_two_folders(tmp_path, monkeypatch):
    for folder in ('_base_', 'a', 'b'):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / 'same.py').touch()
    monkeypatch.setattr('ewa3d.config_files.config_root', lambda: tmp_path)
    with pytest.raises(ValueError, match='a/same, b/same'):
        find_config('same')
    assert find_config('b/same') == tmp_path / 'b' / 'same.py'


def test_build_takes_a_name():
    model = ewa3d.build('quickstart/plain')  # the number of classes comes from the embedded data
    assert model.head.num_classes == 13 and model.usage[None].pipeline


@pytest.mark.parametrize(('config', 'options', 'error', 'text'), [
    (None, {}, TypeError, 'got NoneType'), (3, {}, TypeError, 'got int'), ([1], {}, TypeError, 'got list'),
    ('quickstart/plain', dict(num_classes=0), ValueError, 'num_classes must be at least 1'),
    ('quickstart/plain', dict(num_classes=2.5), TypeError, 'num_classes'),
    ('model.onnx', {}, ValueError, 'model.onnx: an exported model, which onnxruntime opens'),
    ('model.pt2', {}, ValueError, 'torch.export.load opens'), ('no.pt', {}, FileNotFoundError, 'checkpoint no.pt'),
])
def test_what_cannot_be_built(config, options, error, text):
    with pytest.raises(error, match=re.escape(text)):
        ewa3d.build(config, **options)


@pytest.mark.parametrize('name', ['bare.pt', 'bare.ckpt'])
def test_other_endings_of_checkpoints(name, tmp_path):
    model = ewa3d.build('quickstart/plain')
    torch.save(model.state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match='it has no config; give a config'):
        ewa3d.build(tmp_path / name)
    again = ewa3d.build('quickstart/plain', tmp_path / name)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    (tmp_path / 'notes.md').touch()
    with pytest.raises(ValueError, match=r"a config ends in .*, got '\.md'"):
        ewa3d.build(tmp_path / 'notes.md')


def test_names_of_the_package():
    assert set(ewa3d.__all__) <= set(dir(ewa3d))
    with pytest.raises(AttributeError, match='biuld'):
        ewa3d.biuld  # noqa: B018


# ---- the commands ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(('table', 'verb'), [(table, verb) for table in (cli.COMMANDS, ACTIONS) for verb in table])
def test_every_verb_leads_to_a_function(table, verb):
    target, what = table[verb]
    module, _, function = target.partition(':')
    assert callable(getattr(import_module(module), function)) and what


def test_tools_are_commands():
    for script in (REPO / 'tools').glob('*.py'):
        text = script.read_text()
        verb = re.search(r"main\(\['(\w+)'", text)
        assert len(text.splitlines()) < 10 and (verb is None or verb[1] in cli.COMMANDS), script


def test_the_overview(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(['--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and all(f'  {verb} ' in out for verb in cli.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(['--version'])
    assert capsys.readouterr().out == f'ewa3d {ewa3d.__version__}\n'
    assert cli.main([]) == 2
    assert cli.main(['configs', '*scannet23*']) == 0
    assert 'detection/3detr_xs_scratch_scannet23\n' in capsys.readouterr().out
    assert cli.main(['configs', 'scannet23']) == 1
    assert capsys.readouterr() == ('', "no config matches 'scannet23'; did you mean '*scannet23*'?\n")


@pytest.mark.parametrize(('argv', 'text'), [
    (['trian'], "did you mean 'train'"), (['data', 'chek'], "did you mean 'check'"), (['fuse', 'a.pth'], 'out'),
    (['convert', 'x', 'a', 'b'], 'point-mae'), (['train', 'plain', '--sed', '1'], '--sed'),
])
def test_mistakes_are_one_line(argv, text, capsys):
    try:
        code = cli.main(argv)
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.startswith('error: ') and error.count('\n') == 1 and text in error


@pytest.mark.parametrize('argv', [['train', 'quickstart/plain'], ['test', 'quickstart/plain', 'a.pth']])
def test_a_work_dir_that_cannot_be(argv, tmp_path, capsys):
    (tmp_path / 'file').touch()
    assert cli.main([*argv, '--work-dir', str(tmp_path / 'file' / 'run')]) == 2
    error = capsys.readouterr().err
    assert f'{tmp_path / "file"} is a file' in error and error.count('\n') == 1


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    assert check_writable(tmp_path / 'a' / 'b', 'out') == tmp_path / 'a' / 'b' and not (tmp_path / 'a').exists()
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / 'link' / 'a', 'out')
    monkeypatch.setattr('os.access', lambda path, mode: False)
    with pytest.raises(PermissionError, match=r'out .* cannot be written'):
        check_writable(tmp_path / 'a', 'out')


@pytest.mark.parametrize(('module', 'text'), [('sklearn.svm', 'pip install scikit-learn'), ('cv2', 'opencv-python'),
                                              ('plotly', 'pip install plotly')])
def test_a_missing_package_comes_with_the_line_that_helps(module, text):
    assert text in one_line(ModuleNotFoundError(f'No module named {module!r}', name=module))
    assert 'pip' not in one_line(ModuleNotFoundError("No module named 'ewa3d.x'", name='ewa3d.x'))
    told = one_line(ModuleNotFoundError('needs it: pip install other', name=module))
    assert told == 'needs it: pip install other'


# ---- the package -----------------------------------------------------------------------------------------------------
def test_one_version():
    version = ewa3d.__version__.partition('.dev')[0]
    assert re.fullmatch(r'\d+\.\d+\.\d+', version)
    changelog = (REPO / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert re.search(r'^## (\d+\.\d+\.\d+)', changelog, re.MULTILINE)[1] == version
    assert f'\nversion: {version}\n' in (REPO / 'CITATION.cff').read_text(encoding='utf-8')
    assert (REPO / 'ewa3d' / 'py.typed').is_file()


def test_the_package_is_the_command():
    command = [sys.executable, '-m', 'ewa3d', 'configs', '*shapenetpart-16']
    done = subprocess.run(command, capture_output=True, text=True, check=False,
                          env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})
    assert (done.returncode, done.stdout.split()) == (0, ['part_seg/point-mae_xs_scratch_shapenetpart-16'])
