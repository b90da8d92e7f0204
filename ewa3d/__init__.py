"""ewa3d: train-time structure that collapses into a plain model, for transformers on point clouds and images."""
import sys
from typing import TYPE_CHECKING

__version__ = '0.1.0.dev0'
__all__ = ['__version__', 'Reparam', 'expand', 'fuse', 'attach_ewa', 'param_groups', 'build', 'list_configs',
           'from_official']

_LAZY = {'Reparam': 'ewa3d.reparam', 'expand': 'ewa3d.reparam', 'fuse': 'ewa3d.reparam',
         'attach_ewa': 'ewa3d.engine.averaging', 'param_groups': 'ewa3d.engine.params', 'build': 'ewa3d.models.build',
         'list_configs': 'ewa3d.config_files',
         'from_official': 'ewa3d.models.official'}

if TYPE_CHECKING:
    from ewa3d.config_files import list_configs
    from ewa3d.engine.averaging import attach_ewa
    from ewa3d.engine.params import param_groups
    from ewa3d.models.build import build
    from ewa3d.models.official import from_official
    from ewa3d.reparam import Reparam, expand, fuse


def __getattr__(name: str):
    """Import on first use, so that ``import ewa3d`` is quick and needs nothing optional."""
    if name in _LAZY:
        from importlib import import_module
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}', name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    """What is imported on first use is there as well: for completion, and for the nearest name in an error."""
    return sorted({*globals(), *__all__})
