"""What every model shares: one order of construction, behind mmengine's calls."""
import inspect
from collections.abc import Sequence
from pathlib import Path

from mmengine.model import BaseModel
from torch import Tensor, nn

from ewa3d.layers.moe import begin_routing, routing_stats
from ewa3d.models.weights import load_plain, stacked_keys, state_dict_of
from ewa3d.registry import MODELS, nearest
from ewa3d.reparam import glob

__all__ = ['ExpandableModel', 'build_module', 'check_mode', 'inputs_of']

MODES = ('tensor', 'loss', 'predict')


class ExpandableModel(BaseModel):
    """A model of the framework. Its construction has one order: build and initialise, load ``pretrained`` plain
    weights, ``expand``; optimizer, wrappers, compilation and averages come after it.

    With ``mode='loss'`` in training, losses and statistics of routed experts in it join the dict that ``forward``
    returns (:func:`ewa3d.layers.moe.routing_stats`).

    A subclass calls ``super().__init__``, makes its parts (:func:`build_module`) and ends with :meth:`finish`.

    Attributes:
        compiled: the method that a run with ``compile`` compiles for training: tensors in, tensors out.

    Args:
        data_preprocessor: ``Preprocessor`` unless given.
    """
    compiled = 'extract'

    def __init__(self, data_preprocessor: dict | nn.Module | None = None):
        super().__init__(build_module(data_preprocessor or dict(type='Preprocessor')))
        self.register_forward_pre_hook(_begin)
        self.register_forward_hook(_add_routing, with_kwargs=True)

    def finish(self, pretrained: str | dict | None = None, expand: Sequence[dict] | None = None,
               trainable: Sequence[str] | None = None) -> None:
        """The end of a constructor.

        Args:
            pretrained: path of plain weights, or keywords of :func:`ewa3d.models.weights.load_plain` with ``source``.
                A path alone loads what fits of the backbone, and a head only where it fits. The report is kept as
                ``load_report``. Weights of expanded modules are loaded after expanding, and go on as they were.
            expand: rules for :func:`ewa3d.expand`; the report is kept as ``expand_report``.
            trainable: names of what is trained, where the rest is frozen: see :func:`ewa3d.engine.params.freeze`.
        """
        options = _load_options(pretrained)
        experts = bool(options and expand and _is_expanded(options['source'], self.state_dict(), expand))
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


def _begin(model: nn.Module, args) -> None:
    begin_routing(model)


def _add_routing(model: nn.Module, args: tuple, kwargs: dict, output):
    """The loss dict with what routers add to it."""
    mode = kwargs.get('mode', args[2] if len(args) > 2 else None)
    return {**output, **routing_stats(model)} if mode == 'loss' and isinstance(output, dict) else None


def _is_expanded(source: dict, own: dict, rules: Sequence[dict]) -> bool:
    """Whether ``source`` has stacked experts, or tensors of its own inside modules that ``rules`` will expand."""
    rules = [rules] if isinstance(rules, dict) else rules
    places = [glob(rule['at']) for rule in rules if isinstance(rule.get('at'), str)]
    extra = (key.split('.') for key in source if key not in own)
    return bool(stacked_keys(source, own)) or any(
        place.fullmatch('.'.join(parts[:i])) for parts in extra for i in range(1, len(parts)) for place in places)


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
