"""The reference of configs: complete, and as docs/configs.md has it."""
from pathlib import Path

import pytest
from torch import nn

from ewa3d import reference
from ewa3d import registry as R
from ewa3d.datasets.base import PointDataset
from ewa3d.engine.validate import TOP_LEVEL
from ewa3d.layers.experts import EWAFFN
from ewa3d.registry import MODELS, Registry

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'configs.md'


def test_every_key_is_told_about():
    assert reference.undocumented() == []


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding='utf-8') == reference.page(), 'python -m ewa3d.reference > docs/configs.md'


def test_all_keys_at_the_top_are_there():
    assert set(reference.TOP) == TOP_LEVEL


def test_every_registry_with_something_of_ours_is_there():
    own = set()
    for name in R.__all__:
        registry = getattr(R, name)
        if isinstance(registry, Registry):
            registry.import_from_location()
            own |= {name for cls in registry.module_dict.values() if cls.__module__.startswith('ewa3d.')}
    assert own - {'RUNNERS'} == set(reference.PLACES)  # the Runner's keys are those at the top


def test_keys_of_a_rule_are_those_of_expand():
    keys, base = reference.keys_of(EWAFFN)
    assert [key.name for key in keys] == ['num_experts', 'partition', 'init', 'init_noise_std', 'expert_grad_scale']
    assert keys[0].default == 4 and base is None


def test_further_keys_are_those_of_the_base():
    keys, base = reference.keys_of(reference.components()['DATASETS']['ModelNet'])
    assert base is PointDataset and 'pipeline' not in [key.name for key in keys]


def test_docstrings_of_several_names_and_entries(monkeypatch):
    class Toy(nn.Module):
        """What it is.

        Args:
            a, b: two of
                them | both. c: ``'x'`` of :class:`~a.b.Sample`: told.
            d: see c: not an entry.

        Raises:
            ValueError: e: no.
        """

        def __init__(self, a, b=1.5, c='x', d=nn.ReLU, e=None):
            super().__init__()

    Toy.__module__ = 'ewa3d.toy'
    monkeypatch.setitem(MODELS.module_dict, 'Toy', Toy)
    texts = {key.name: key.text for key in reference.keys_of(Toy)[0]}
    assert texts == dict(a='two of them | both', b='two of them | both', c="`'x'` of `Sample`: told",
                         d='see c: not an entry', e='')
    assert 'Toy.e' in reference.undocumented() and 'Toy.a' not in reference.undocumented()
    entry = reference._entry('Toy', Toy)
    assert r'| `b` | `1.5` | two of them \| both |' in entry and '| `d` | `ReLU` |' in entry and '| `a` | – |' in entry


def test_single_components(capsys):
    assert reference.main(['Resample']) == 0
    out = capsys.readouterr().out
    assert out.startswith('### Resample') and '`num_points`' in out and 'EWAFFN' not in out
    with pytest.raises(KeyError, match='Resample'):
        reference.main(['Resampel'])
