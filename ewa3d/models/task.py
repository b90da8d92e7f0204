"""The model that a runner trains: preprocessor, backbone, neck, head."""
import inspect
from collections.abc import Sequence

from mmengine.model import BaseModel
from torch import Tensor, nn

from ewa3d.models.weights import load_plain
from ewa3d.registry import MODELS, nearest
from ewa3d.structures import Sample

__all__ = ['TaskModel']


@MODELS.register_module()
class TaskModel(BaseModel):
    """Backbone, neck and head behind mmengine's calls.

    Construction has one order: build and initialise, load ``pretrained`` plain weights, ``expand``. Optimizer,
    wrappers, compilation and averages come after it.

    Args:
        backbone, neck, head: modules or configs. What follows from another part is filled in where a config leaves it
            out: the neck's ``num_prefix_tokens``, the head's ``in_channels``.
        expand: rules for :func:`ewa3d.expand`; the report is kept as ``expand_report``.
        pretrained: path of plain weights, or keywords of :func:`ewa3d.models.weights.load_plain` with ``source``. A
            path alone loads what fits of the backbone, and the head only where it fits.
        data_preprocessor: ``Preprocessor`` unless given.

    Shape:
        - inputs ``dict(points=(B, N, 3 + F))``.
        - returns the head's raw output (``mode='tensor'``), a dict of losses (``'loss'``) or samples (``'predict'``).
    """

    def __init__(self, backbone: dict | nn.Module, neck: dict | nn.Module | None = None,
                 head: dict | nn.Module | None = None, expand: Sequence[dict] | None = None,
                 pretrained: str | dict | None = None, data_preprocessor: dict | nn.Module | None = None):
        super().__init__(_build(data_preprocessor or dict(type='Preprocessor')))
        self.backbone = _build(backbone)
        self.neck = _build(neck, num_prefix_tokens=getattr(self.backbone, 'num_prefix_tokens', 0))
        width = self.backbone.embed_dim
        if hasattr(self.neck, 'out_channels'):
            width = self.neck.out_channels(width)
        self.head = _build(head, in_channels=width)
        if pretrained:
            options = dict(source=pretrained, strict=False, skip_head='mismatched') \
                if isinstance(pretrained, str) else dict(pretrained)
            self.load_report = load_plain(self, **options)
        if expand:
            from ewa3d.reparam import expand as expand_modules
            self.expand_report = expand_modules(self, expand)
        self._is_init = True

    def init_weights(self) -> None:
        """Nothing: constructors initialise. mmengine calls this before training, when weights may be loaded already
        (and would call the ``init_weights`` of every part, timm's models among them)."""

    def extract(self, points: Tensor | dict) -> Tensor:
        """Pooled features, the head's input, of ``points`` ``(B, N, 3 + F)`` (or of ``dict(points=...)``)."""
        inputs = points if isinstance(points, dict) else dict(points=points)
        feats = self.backbone(inputs)
        return feats if self.neck is None else self.neck(feats)

    def forward(self, inputs: dict | Tensor, data_samples: Sequence[Sample] | None = None, mode: str = 'tensor'):
        if mode not in ('tensor', 'loss', 'predict'):
            raise ValueError(f'mode={mode!r}: {nearest(mode, ("tensor", "loss", "predict"))}')
        feats = self.extract(inputs)
        if self.head is None:
            if mode == 'tensor':
                return feats
            raise ValueError(f'mode={mode!r} needs a head; this model has none')
        if mode == 'tensor':
            return self.head(feats)
        if mode == 'predict':
            return self.head.predict(feats, data_samples)
        if data_samples is None:
            raise ValueError("mode='loss' needs data_samples")
        return self.head.loss(feats, data_samples)


def _build(cfg: dict | nn.Module | None, **derived) -> nn.Module | None:
    """The module of ``cfg``, with those of the ``derived`` keywords that its class takes and the config leaves out."""
    if cfg is None or isinstance(cfg, nn.Module):
        return cfg
    if 'type' in cfg:
        cls = MODELS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
        taken = inspect.signature(cls).parameters
        derived = {k: v for k, v in derived.items() if k in taken and cfg.get(k) is None}
        cfg = {**cfg, **derived}
    return MODELS.build(cfg)
