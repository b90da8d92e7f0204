"""Look-ups by name: closed, and with errors that help."""
import sys

import pytest

from ewa3d.registry import (
    DATASETS,
    HOOKS,
    METRICS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    check_keywords,
    nearest,
)

ALL = (MODELS, DATASETS, TRANSFORMS, METRICS, HOOKS, PARAM_SCHEDULERS, OPTIM_WRAPPERS, OPTIM_WRAPPER_CONSTRUCTORS)


@pytest.mark.parametrize('registry, wrong, right', [
    (MODELS, 'TokenEncodr', 'TokenEncoder'), (MODELS, 'EWAFNN', 'EWAFFN'), (DATASETS, 'ModelNett', 'ModelNet'),
    (DATASETS, 'FolderPointClouds', 'FolderPointCloud'), (TRANSFORMS, 'RandomScael', 'RandomScale'),
    (HOOKS, 'EWAHok', 'EWAHook'), (HOOKS, 'EMAHok', 'EMAHook'), (METRICS, 'Acuracy', 'Accuracy'),
    (PARAM_SCHEDULERS, 'WarmupCosinLR', 'WarmupCosineLR'), (OPTIM_WRAPPERS, 'AutocastOptimWraper',
                                                            'AutocastOptimWrapper')])
def test_unknown_types_name_the_nearest(registry, wrong, right):
    for call in (lambda: registry.get(wrong), lambda: registry.build(dict(type=wrong))):
        with pytest.raises(KeyError, match=rf"'{wrong}' is not a registered {registry.name}; did you mean .*'{right}'"):
            call()
    assert wrong not in registry and right in registry


@pytest.mark.parametrize('registry, cfg, wrong, right', [
    (MODELS, dict(type='PointPatchEmbed', num_group=4), 'num_group', 'num_groups'),
    (MODELS, dict(type='ClsHead', num_class=4), 'num_class', 'num_classes'),
    (DATASETS, dict(type='ModelNet', varient=10), 'varient', 'variant'),
    (DATASETS, dict(type='SyntheticShapes', num_sample=1), 'num_sample', 'num_samples'),
    (TRANSFORMS, dict(type='Resample', num_point=4), 'num_point', 'num_points'),
    (HOOKS, dict(type='EWAHook', sharerate=0.1), 'sharerate', 'share_rate'),
    (HOOKS, dict(type='CheckpointHook', intervall=1), 'intervall', 'interval')])
def test_unknown_keywords_name_the_nearest(registry, cfg, wrong, right):
    with pytest.raises(TypeError, match=rf"{cfg['type']} takes no '{wrong}'; did you mean .*'{right}'"):
        registry.build(cfg)


@pytest.mark.parametrize('registry', ALL, ids=lambda registry: registry.name)
@pytest.mark.parametrize('name', ['os.system', 'builtins.eval', 'builtins.print', 'subprocess.Popen', 'torch.nn.Linear',
                                  'mmengine.runner.Runner', 'mmengine.Runner', 'ewa3d.cli.main', 'antigravity', '',
                                  '.', 'ewa3d.', '__builtins__'])
def test_look_ups_never_import(registry, name):
    for call in (lambda: registry.get(name), lambda: registry.build(dict(type=name))):
        with pytest.raises(KeyError, match='is not a registered'):
            call()


def test_a_module_that_a_name_points_at_is_not_run(tmp_path, monkeypatch):
    (tmp_path / 'tempting.py').write_text('raise SystemExit(1)\n')
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('tempting.Model', 'tempting'):
        with pytest.raises(KeyError, match='tempting'):
            MODELS.build(dict(type=name))
    assert 'tempting' not in sys.modules


def test_scopes():
    assert MODELS.get('ewa3d.TokenEncoder') is MODELS.get('TokenEncoder')
    assert HOOKS.get('mmengine.EMAHook') is HOOKS.get('EMAHook')
    for name in ('foo.TokenEncoder', 'mmengine.TokenEncoder', 'mmdet.TokenEncoder'):
        with pytest.raises(KeyError, match='is not a registered model'):
            MODELS.get(name)
    with pytest.raises(KeyError, match='is not a registered hook'):
        HOOKS.get('ewa3d.EMAHook')
    assert type(HOOKS.build(dict(type='EWAHook', _scope_='ewa3d'))).__name__ == 'EWAHook'


@pytest.mark.parametrize('value', [3, None, ['TokenEncoder'], b'TokenEncoder'])
def test_types_that_are_no_names(value):
    with pytest.raises(TypeError, match='a type is a string or a class'):
        MODELS.get(value)
    with pytest.raises(TypeError):
        MODELS.build(dict(type=value))


def test_classes_as_types():
    from ewa3d.models.necks import TokenPool
    assert isinstance(MODELS.build(dict(type=TokenPool)), TokenPool)
    with pytest.raises(TypeError, match="TokenPool takes no 'mod'; did you mean 'mode'"):
        MODELS.build(dict(type=TokenPool, mod='cls'))


def test_nearest():
    assert nearest('linaer', ['linear', 'all']) == "did you mean 'linear'?"
    assert nearest('xyz', ['linear', 'all']) == 'valid names: all, linear'
    assert nearest('xyz', []) == 'valid names: none'
    assert nearest('xyz', map(str, range(99))).endswith(', …')
    assert nearest(3, [1, 31]) == "did you mean '31'?"


def test_keywords_that_pass_through():
    class Base:
        def __init__(self, width=1):
            pass

    class Child(Base):
        def __init__(self, depth=1, **kwargs):
            super().__init__(**kwargs)

    class Open:
        def __init__(self, **kwargs):
            pass

    check_keywords(Child, dict(type='Child', depth=1, width=2))
    with pytest.raises(TypeError, match="here: Child takes no 'widht'; did you mean 'width'"):
        check_keywords(Child, dict(widht=2), 'here')
    check_keywords(Open, dict(anything=2))


def test_sentences_end_once():
    for wrong in ('TokenPol', 'Qqqqqq'):
        with pytest.raises(KeyError) as error:
            MODELS.get(wrong)
        assert '?.' not in str(error.value) and ('? New' in str(error.value) or '. New' in str(error.value))
