"""What every model shares: one order of construction, behind mmengine's calls."""
import inspect
from collections.abc import Sequence
from pathlib import Path

from mmengine.model import BaseModel
from torch import Tensor, nn

from ewa3d.models.weights import load_plain, stacked_keys, state_dict_of
from ewa3d.registry import MODELS, nearest

__all__ = ['ExpandableModel', 'build_module', 'check_mode', 'inputs_of']

MODES = ('tensor', 'loss', 'predict')


class ExpandableModel(BaseModel):
    """A model of the framework. Its construction has one order: build and initialise, load ``pretrained`` plain
    weights, ``expand``; optimizer, wrappers, compilation and averages come after it.

    A subclass calls ``super().__init__``, makes its parts (:func:`build_module`) and ends with :meth:`finish`.

    Attributes:
        compiled: the method that a run with ``compile`` compiles for training: tensors in, tensors out.

    Args:
        data_preprocessor: ``Preprocessor`` unless given.
    """
    compiled = 'extract'

    def __init__(self, data_preprocessor: dict | nn.Module | None = None):
        super().__init__(build_module(data_preprocessor or dict(type='Preprocessor')))

    def finish(self, pretrained: str | dict | None = None, expand: Sequence[dict] | None = None,
               trainable: Sequence[str] | None = None) -> None:
        """The end of a constructor.

        Args:
            pretrained: path of plain weights, or keywords of :func:`ewa3d.models.weights.load_plain` with ``source``.
                A path alone loads what fits of the backbone, and a head only where it fits. The report is kept as
                ``load_report``. Stacked experts are loaded after expanding, and go on as they were.
            expand: rules for :func:`ewa3d.expand`; the report is kept as ``expand_report``.
            trainable: names of what is trained, where the rest is frozen: see :func:`ewa3d.engine.params.freeze`.
        """
        options = _load_options(pretrained)
        experts = bool(options and expand and stacked_keys(options['source'], self.state_dict()))
        if options and not experts:
            self.load_report = load_plain(self, **options)
        if expand:
            from ewa3d.reparam import expand as expand_modules
            self.expand_report = expand_modules(self, expand)
        if experts:
            self.load_report = load_plain(self, **options)
        if trainable is not None:
            from ewa3d.engine.params import freeze
            freeze(self, trainable)
        self._is_init = True

    def init_weights(self) -> None:
        """Nothing: constructors initialise. mmengine calls this before training, when weights may be loaded already
        (and would call the ``init_weights`` of every part, timm's models among them)."""


def _load_options(pretrained: str | dict | None) -> dict | None:
    """Keywords of ``load_plain``, with the tensors in place of the file."""
    if not pretrained:
        return None
    options = dict(source=pretrained, strict=False, skip_head='mismatched') if isinstance(pretrained, str) \
        else dict(pretrained)
    if isinstance(options['source'], (str, Path)):
        options.setdefault('name', str(options['source']))
    options['source'] = state_dict_of(options['source'], options.get('name') or 'the given weights')
    return options


def build_module(cfg: dict | nn.Module | None, **derived) -> nn.Module | None:
    """The module of ``cfg``, with those of the ``derived`` keywords that its class takes and the config leaves out."""
    if cfg is None or isinstance(cfg, nn.Module):
        return cfg
    if 'type' in cfg:
        cls = MODELS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
        taken = inspect.signature(cls).parameters
        derived = {k: v for k, v in derived.items() if k in taken and cfg.get(k) is None}
        cfg = {**cfg, **derived}
    return MODELS.build(cfg)


def check_mode(mode: str) -> None:
    """Raise ``ValueError`` unless ``mode`` is one of mmengine's."""
    if mode not in MODES:
        raise ValueError(f'mode={mode!r}: {nearest(mode, MODES)}')


def inputs_of(points: Tensor | dict) -> dict:
    """``points`` as the inputs of a model, which are a dict."""
    return points if isinstance(points, dict) else dict(points=points)
