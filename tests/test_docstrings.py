"""What is public is documented: what can be seen without reading it."""
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from torch import nn

import ewa3d
from ewa3d.registry import MODELS
from ewa3d.reparam import Reparam

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(module.name for module in pkgutil.walk_packages(ewa3d.__path__, 'ewa3d.')
               if not module.name.endswith('__main__') and not module.name.startswith('ewa3d.configs'))
ARRAYS = re.compile(r"(<class ')?[\w.]*\b(Tensor|ndarray)\b('>)?( \| None)?")
RAISE = re.compile(r'^\s*raise \w', re.MULTILINE)
TELLS_SHAPE = re.compile(r'Shape\b|``\(|shape')
TELLS_SOURCE = re.compile(r'arXiv|\b(19|20)\d\d\b|ZeroI2V|HiPPO|S4D')


def public(module) -> list:
    """Functions and classes that a module offers as its own."""
    found = [getattr(module, name) for name in getattr(module, '__all__', ())]
    return [one for one in found if (inspect.isfunction(one) or inspect.isclass(one))
            and one.__module__ == module.__name__]


def told(cls: type) -> str:
    """The docstrings of a class, of the ones it is made of, and of its calls."""
    docs = [owner.__doc__ for owner in cls.__mro__ if owner.__module__.startswith('ewa3d')]
    docs += [getattr(cls.__dict__.get(name), '__doc__', None) for name in ('__init__', 'forward', 'expand')]
    return '\n'.join(doc for doc in docs if doc)


def source(function) -> str:
    """Nothing where there is none: what dataclass writes."""
    try:
        return inspect.getsource(function) if inspect.isfunction(function) else ''
    except OSError:
        return ''


def complaints(one) -> list[str]:
    """What a function or class does not tell."""
    doc = inspect.cleandoc(one.__dict__.get('__doc__') or '') if inspect.isclass(one) else inspect.getdoc(one) or ''
    if not doc or (inspect.isclass(one) and doc.startswith(f'{one.__name__}(')):  # what dataclass writes
        return ['no docstring']
    found = []
    if inspect.isclass(one):
        own = one.__dict__.get('__init__')
        if RAISE.search(source(own)) and 'Raises' not in told(one):
            found.append('no Raises')
        if issubclass(one, nn.Module) and 'forward' in one.__dict__ and not TELLS_SHAPE.search(told(one)):
            found.append('no Shape')
        found += [f'no docstring of {name}' for name, member in one.__dict__.items() if not name.startswith('_')
                  and (inspect.isfunction(member) or isinstance(member, (property, classmethod, staticmethod)))
                  and not inspect.getdoc(getattr(one, name) if not isinstance(member, property) else member)
                  and not any(inspect.getdoc(getattr(base, name, None)) for base in one.__mro__[1:])]
        return found
    if RAISE.search(source(one)) and one.__name__ != 'main' and not re.search('Raise|rror|refuse', doc):
        found.append('no Raises')
    if any(ARRAYS.fullmatch(str(p.annotation)) for p in inspect.signature(one).parameters.values()) \
            and not TELLS_SHAPE.search(doc):
        found.append('no Shape')
    return found


@pytest.mark.parametrize('package', sorted({name.split('.')[1] for name in NAMES}))
def test_what_is_public_is_documented(package):
    missing = []
    for name in NAMES:
        if name.split('.')[1] != package:
            continue
        module = importlib.import_module(name)
        if not module.__doc__:
            missing.append(f'{name}: no docstring')
        missing += [f'{name}.{one.__qualname__}: {what}' for one in public(module) for what in complaints(one)]
    assert not missing, '\n'.join(missing)


def test_every_structure_names_its_source():
    MODELS.import_from_location()
    classes = [cls for cls in MODELS.module_dict.values() if inspect.isclass(cls) and issubclass(cls, Reparam)]
    missing = [cls.__name__ for cls in classes if cls.__module__.startswith('ewa3d.') and not TELLS_SOURCE.search(
        told(cls) + (inspect.getmodule(cls).__doc__ or ''))]
    assert len(classes) > 5 and not missing


def test_results_that_are_told_are_in_a_table():
    """``94.20 ± 0.06`` in the README or docs is a row of configs/*/README.md."""
    rows = '\n'.join(path.read_text(encoding='utf-8') for path in (ROOT / 'configs').glob('*/README.md'))
    pages = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    found = {number for page in pages for number in re.findall(r'\d+\.\d+ ± \d+\.\d+', page.read_text('utf-8'))}
    assert len(found) > 5 and not {number for number in found if number not in rows}
