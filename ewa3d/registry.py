"""The registries of ewa3d: children of mmengine's, so that ``'AdamW'`` or ``'EMAHook'`` resolve without a prefix.

A registry imports the modules under its ``locations`` on the first lookup; nothing has to be imported by hand.
Two things differ from mmengine's own class:

* a name that is not registered is an error that lists the nearest names. mmengine falls back to importing the
  name as a Python path; a config may come from a checkpoint file, so that fallback is closed here;
* a keyword that the constructor does not take is an error that lists the nearest keywords.
"""
import difflib
import inspect
from typing import Any

from mmengine import registry as mmengine_registry
from mmengine.config import Config, ConfigDict
from mmengine.registry import Registry as _Registry
from mmengine.registry import build_from_cfg
from mmengine.registry import build_model_from_cfg as _build_model

__all__ = ['Registry', 'nearest', 'MODELS', 'DATASETS', 'TRANSFORMS', 'METRICS', 'HOOKS', 'SAMPLERS', 'OPTIMIZERS',
           'OPTIM_WRAPPERS', 'OPTIM_WRAPPER_CONSTRUCTORS', 'PARAM_SCHEDULERS', 'VISUALIZERS', 'VISBACKENDS', 'LOOPS',
           'LOG_PROCESSORS', 'EVALUATORS', 'FUNCTIONS', 'RUNNERS', 'MODEL_WRAPPERS']

SCOPE = 'ewa3d'


def nearest(name: str, valid, n: int = 3) -> str:
    """A phrase for an error message: the valid names that look most like ``name``, or all of a short list."""
    valid = sorted(str(v) for v in valid)
    close = difflib.get_close_matches(str(name), valid, n=n, cutoff=0.5)
    if close:
        return 'did you mean ' + ' or '.join(repr(c) for c in close) + '?'
    shown = ', '.join(valid[:30]) + (', …' if len(valid) > 30 else '')
    return f'valid names: {shown or "none"}'


def check_keywords(cls: Any, cfg: dict, where: str = '') -> None:
    """Raise ``TypeError`` when ``cfg`` has a keyword that ``cls`` does not take, naming the nearest ones.

    A constructor with ``**kwargs`` passes them on; its base classes are asked in turn.
    """
    accepted: set[str] = set()
    classes = [c for c in cls.__mro__ if c is not object] if inspect.isclass(cls) else [cls]
    for candidate in classes:
        function = candidate.__dict__.get('__init__') if inspect.isclass(candidate) else candidate
        if function is None:
            continue
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):  # a C constructor tells nothing: let the call itself complain
            return
        accepted |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {'self'}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    else:
        return  # **kwargs all the way up
    for key in cfg:
        if key not in accepted and key not in ('type', '_scope_'):
            name = getattr(cls, '__name__', str(cls))
            raise TypeError(f'{where + ": " if where else ""}{name} takes no {key!r}; {nearest(key, accepted)}')


class Registry(_Registry):
    """mmengine's registry with closed look-ups and errors that help (see the module's docstring)."""

    def get(self, key: str):
        """The registered class or function of ``key`` (``'Name'``, ``'ewa3d.Name'`` or ``'mmengine.Name'``).

        Raises:
            KeyError: ``key`` is not registered here or in a parent.
        """
        if not isinstance(key, str):
            raise TypeError(f'{self.name}: a type is a string or a class, got {key!r}')
        self.import_from_location()
        scope, name = self.split_scope_key(key)
        registry = self
        while registry is not None:
            if scope in (None, registry.scope):
                found = registry._module_dict.get(name)
                if found is not None:
                    return found
            registry = registry.parent
        hint = nearest(name, self.names())
        raise KeyError(f'{key!r} is not a registered {self.name}; {hint}{"" if hint.endswith("?") else "."} '
                       f'New ones are registered with @{self._python_name}.register_module() '
                       f'and imported by `custom_imports` in the config.')

    def __contains__(self, key) -> bool:
        try:
            return self.get(key) is not None
        except KeyError:
            return False

    def names(self) -> set[str]:
        """Every name that :meth:`get` resolves, the parent's included."""
        self.import_from_location()
        parent = self.parent._module_dict if self.parent is not None else {}
        return set(self._module_dict) | set(parent)

    @property
    def _python_name(self) -> str:
        return self.name.replace(' ', '_').upper() + 'S'


def _checked(build_func):
    """``build_func`` behind a check of the type and of its keywords."""

    def build(cfg, registry, *args, **kwargs):
        if isinstance(cfg, (dict, ConfigDict, Config)) and 'type' in cfg:
            cls = registry.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
            check_keywords(cls, cfg)
        return build_func(cfg, registry, *args, **kwargs)

    return build


def _child(name: str, parent: _Registry, *locations: str, build_func=build_from_cfg) -> Registry:
    return Registry(name, parent=parent, scope=SCOPE, locations=[f'{SCOPE}.{place}' for place in locations],
                    build_func=_checked(build_func))


MODELS = _child('model', mmengine_registry.MODELS, 'layers', 'models', build_func=_build_model)
DATASETS = _child('dataset', mmengine_registry.DATASETS, 'datasets')
TRANSFORMS = _child('transform', mmengine_registry.TRANSFORMS, 'datasets')
METRICS = _child('metric', mmengine_registry.METRICS, 'evaluation', 'evaluation_parts', 'evaluation_pretrain',
                 'evaluation_tasks')
HOOKS = _child('hook', mmengine_registry.HOOKS, 'engine', 'protocols')
PARAM_SCHEDULERS = _child('parameter scheduler', mmengine_registry.PARAM_SCHEDULERS, 'engine',
                          build_func=mmengine_registry.PARAM_SCHEDULERS.build_func)
OPTIM_WRAPPERS = _child('optim_wrapper', mmengine_registry.OPTIM_WRAPPERS, 'engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child('optimizer wrapper constructor', mmengine_registry.OPTIM_WRAPPER_CONSTRUCTORS,
                                    'engine')
SAMPLERS = _child('data sampler', mmengine_registry.DATA_SAMPLERS, 'datasets')
# These hold nothing of ours; they exist so that look-ups under the scope 'ewa3d' are quiet.
OPTIMIZERS = _child('optimizer', mmengine_registry.OPTIMIZERS)
VISUALIZERS = _child('visualizer', mmengine_registry.VISUALIZERS)
VISBACKENDS = _child('vis_backend', mmengine_registry.VISBACKENDS)
LOOPS = _child('loop', mmengine_registry.LOOPS)
LOG_PROCESSORS = _child('log_processor', mmengine_registry.LOG_PROCESSORS)
EVALUATORS = _child('evaluator', mmengine_registry.EVALUATOR)
FUNCTIONS = _child('function', mmengine_registry.FUNCTIONS)
RUNNERS = _child('runner', mmengine_registry.RUNNERS)
MODEL_WRAPPERS = _child('model_wrapper', mmengine_registry.MODEL_WRAPPERS)
