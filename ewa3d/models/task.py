"""The model that a runner trains: preprocessor, backbone, neck, head."""
from collections.abc import Sequence

from torch import Tensor, nn

from ewa3d.models.base import ExpandableModel, build_module, check_mode, inputs_of
from ewa3d.registry import MODELS
from ewa3d.structures import Sample

__all__ = ['TaskModel']


@MODELS.register_module()
class TaskModel(ExpandableModel):
    """Backbone, neck and head behind mmengine's calls.

    Args:
        backbone, neck, head: modules or configs. What follows from another part is filled in where a config leaves it
            out: the neck's ``num_prefix_tokens``, ``embed_dim``, ``in_channels`` and ``skip_origin``, the head's
            ``in_channels``. A neck with ``out_indices`` is given the features of these blocks, where the tokens sit,
            and the inputs.
        expand, pretrained: see :meth:`ExpandableModel.finish`.
        data_preprocessor: ``Preprocessor`` unless given.

    Shape:
        - inputs ``dict(points=(B, N, 3 + F))``, and what else the neck asks for (``category=(B,)``).
        - returns the head's raw output (``mode='tensor'``), a dict of losses (``'loss'``) or samples (``'predict'``).
    """

    def __init__(self, backbone: dict | nn.Module, neck: dict | nn.Module | None = None,
                 head: dict | nn.Module | None = None, expand: Sequence[dict] | None = None,
                 pretrained: str | dict | None = None, data_preprocessor: dict | nn.Module | None = None):
        super().__init__(data_preprocessor)
        self.backbone = build_module(backbone)
        tokenizer = getattr(self.backbone, 'tokenizer', None)
        self.neck = build_module(neck, num_prefix_tokens=getattr(self.backbone, 'num_prefix_tokens', 0),
                                 embed_dim=self.backbone.embed_dim, in_channels=getattr(tokenizer, 'in_channels', 3),
                                 skip_origin=getattr(tokenizer, 'skip_origin', False))
        width = self.backbone.embed_dim
        if hasattr(self.neck, 'out_channels'):
            width = self.neck.out_channels(width)
        self.head = build_module(head, in_channels=width)
        self.finish(pretrained, expand)

    def extract(self, points: Tensor | dict) -> Tensor:
        """The head's input, of ``points`` ``(B, N, 3 + F)`` or of ``dict(points=...)``: pooled features, those of
        every point, or those of object queries."""
        inputs = inputs_of(points)
        if hasattr(self.neck, 'out_indices'):
            return self.neck(*self.backbone.located(inputs, self.neck.out_indices), inputs)
        feats = self.backbone(inputs)
        return feats if self.neck is None else self.neck(feats)

    def forward(self, inputs: dict | Tensor, data_samples: Sequence[Sample] | None = None, mode: str = 'tensor'):
        check_mode(mode)
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
