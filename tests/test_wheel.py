"""A wheel is complete: built, installed into an environment of its own, used from another folder."""
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SOURCES = ('ewa3d', 'configs', 'pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md',
           'CITATION.cff')
OPTIONS = ['model.backbone.depth=2', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1',
           'optim_wrapper.type=OptimWrapper', 'model.backbone.tokenizer.num_groups=8',
           *(f'{split}_dataloader.dataset.{key}' for split in ('train', 'val', 'test')
             for key in ('num_samples=26', 'num_points=1024')), 'train_dataloader.batch_size=13']
USE = """
import sys
from pathlib import Path
import torch
import ewa3d
from ewa3d.cli import main

assert Path(ewa3d.__file__).is_relative_to(sys.prefix), ewa3d.__file__
assert 'quickstart/ewa' in ewa3d.list_configs('quickstart/*')
options = ['--cfg-options', *sys.argv[1:]]
assert main(['train', 'quickstart/ewa', '--work-dir', 'run', *options]) == 0
assert main(['fuse', 'run/epoch_1.pth', 'fused.pth']) == 0
assert main(['test', 'configs/quickstart/plain.py', 'fused.pth', '--work-dir', 'run/test', *options]) == 0
found = ewa3d.build('fused.pth').predict(torch.rand(500, 3))
assert found.class_name in found.classes and len(found.classes) == 13
print('used', ewa3d.__version__)
"""


def run(*command, cwd: Path) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'PYTHONHOME')}
    env.update(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='', PIP_NO_INDEX='1', PIP_DISABLE_PIP_VERSION_CHECK='1')
    return subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    pytest.importorskip('setuptools', minversion='77')
    folder = tmp_path_factory.mktemp('wheel')
    (folder / 'source').mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, folder / 'source' / name)
    done = run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', folder / 'dist',
               folder / 'source', cwd=folder)
    if 'No module named pip' in done.stderr:
        pytest.skip('building a wheel needs pip here')
    assert done.returncode == 0, done.stdout + done.stderr
    return next((folder / 'dist').glob('ewa3d-*.whl'))


def test_everything_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        entry_points = file.read(next(n for n in names if n.endswith('entry_points.txt'))).decode()
    wanted = {p.relative_to(REPO).as_posix() for p in (REPO / 'ewa3d').rglob('*.py')} | {'ewa3d/py.typed'}
    wanted |= {f'ewa3d/{p.relative_to(REPO).as_posix()}' for p in (REPO / 'configs').rglob('*.py')}
    assert wanted <= names, sorted(wanted - names)[:5]
    strange = [n for n in names if n.partition('/')[0] not in ('ewa3d',) and '.dist-info/' not in n]
    assert not strange and not [n for n in names if '__pycache__' in n]
    assert 'ewa3d = ewa3d.cli:main' in entry_points


def test_it_works_from_another_folder(wheel, tmp_path):
    home, elsewhere = tmp_path / 'env', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    venv.create(home, with_pip=False)
    bin_, python = next((home / b, home / b / p) for b, p in (('bin', 'python'), ('Scripts', 'python.exe'))
                        if (home / b / p).exists())
    site = run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))', cwd=elsewhere).stdout.strip()
    packages = [path for path in sys.path if Path(path).name in ('site-packages', 'dist-packages')]
    Path(site, 'same_packages.pth').write_text('\n'.join(packages) + '\n')
    done = run(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--ignore-installed', wheel,
               cwd=elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(python, '-c', USE, *OPTIONS, cwd=elsewhere)
    assert done.returncode == 0 and 'used' in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    done = run(bin_ / 'ewa3d', 'configs', '*scannet23*', cwd=elsewhere)
    assert done.returncode == 0 and 'detection/3detr_xs_scratch_scannet23' in done.stdout, done.stderr
