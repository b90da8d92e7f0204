"""Shared fixtures: one thread, seeded generators, and where real data and reference arrays are found."""
import importlib.util
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch3d_toy
import torch
from mmengine.registry import DefaultScope

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / 'data'
FIXTURES = REPO.parent / 'shared' / 'fixtures'


@pytest.fixture(scope='session', autouse=True)
def _one_thread():
    """Several busy processes with many threads each collapse on a small machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope='session', autouse=True)
def _freed_memory_goes_back():
    """The runner tells the allocator to keep what is freed, for good: over thousands of tests, some of them of
    full-size models, a process would grow by many GiB."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('ewa3d.engine.runner.keep_freed_memory', lambda: True)
        yield


@pytest.fixture(autouse=True)
def _no_default_scope():
    """A runner of an earlier test leaves its registry scope behind: a test must not pass or fail by its order."""
    DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def pytorch3d(monkeypatch):
    """pytorch3d serves the operators: the real one where it is installed, elsewhere a toy with its signatures."""
    if importlib.util.find_spec('pytorch3d') is None:
        for name, module in pytorch3d_toy.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv('EWA3D_BACKEND', 'pytorch3d')


def _existing(root: Path, name: str, what: str) -> Path:
    path = root / name if name else root
    if not path.exists():
        pytest.skip(f'{what} {path} is not here')
    return path


@pytest.fixture(scope='session')
def dataset_dir():
    """``dataset_dir('modelnet40_normal_resampled')``: the folder under ``data/``, or a skip that names it."""
    return lambda name='': _existing(DATA, name, 'data set')


@pytest.fixture(scope='session')
def fixture_dir():
    """``fixture_dir('pointmae_cls')``: the folder of reference arrays, or a skip that names it."""
    return lambda name='': _existing(FIXTURES, name, 'reference fixture')


@pytest.fixture(scope='session')
def data_root(dataset_dir):
    """The repository's ``data/`` folder, or a skip."""
    return dataset_dir()


@pytest.fixture(scope='session')
def fixtures_root(fixture_dir):
    """The folder that holds all reference fixtures, or a skip."""
    return fixture_dir()


@pytest.fixture(scope='session')
def reference(fixture_dir):
    """``reference('point_ops')``: ``.inputs`` and ``.expected`` (dicts of tensors), ``.meta``, ``.path``; or a skip."""

    def load(name: str) -> SimpleNamespace:
        path = fixture_dir(name)
        arrays = {}
        for part in ('inputs', 'expected'):
            with np.load(path / f'{part}.npz', allow_pickle=False) as file:
                arrays[part] = {key: torch.from_numpy(file[key]) for key in file.files}
        return SimpleNamespace(path=path, meta=json.loads((path / 'meta.json').read_text()), **arrays)

    return load
