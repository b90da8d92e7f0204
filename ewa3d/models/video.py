"""Models of clips: timm's image models on frames, the pooling of frames, and the head that averages them."""
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.video_tokens import ClipTime
from ewa3d.models.heads import ClsHead
from ewa3d.models.necks import TokenPool
from ewa3d.models.timm_backbone import TimmBackbone
from ewa3d.registry import MODELS
from ewa3d.structures import Sample, Tokens

__all__ = ['ClipPool', 'I3DHead', 'TimmVideoBackbone']


@MODELS.register_module()
class TimmVideoBackbone(ClipTime, TimmBackbone):
    """A plain ViT of timm (CLIP, DeiT, DINO, …) on the frames of clips, with a temporal embedding (ZeroI2V).

    Names and weights are those of :class:`~ewa3d.models.timm_backbone.TimmBackbone`, and ``temporal_embed`` ``(1, T,
    embed_dim)``, zero at first, which every token gets before the first norm. Frames see each other where an attention
    has been expanded to an :class:`~ewa3d.layers.temporal.STDHA`.

    Args:
        name, checkpoint, **kwargs: of ``TimmBackbone``.
        num_frames: T, of a clip.

    Shape:
        - ``inputs['video']`` (or a tensor) ``(B, T, C, H, W)``, or ``(B, V, T, …)`` with V views; returns
          ``(B·V·T, num_prefix_tokens + L, embed_dim)`` after the final norm.

    Raises:
        ValueError: a model that is no plain ViT, ``pool``; and what ``TimmBackbone`` raises.
    """

    def __init__(self, name: str, num_frames: int = 8, checkpoint=None, **kwargs):
        if kwargs.pop('pool', False):
            raise ValueError('TimmVideoBackbone: pool=True would hide the frames; a ClipPool pools their tokens')
        super().__init__(name, checkpoint, **kwargs)
        try:
            self._plain_vit('tokenize')
        except NotImplementedError as error:
            raise ValueError(f'TimmVideoBackbone: a plain ViT was expected: {error}') from None
        self.add_time(num_frames, self.embed_dim)

    def no_weight_decay(self) -> set[str]:
        return TimmBackbone.no_weight_decay(self) | super().no_weight_decay()

    def tokenize(self, inputs: Mapping | Tensor) -> Tokens:
        return self.timed(super().tokenize(self.frames(inputs, 'video', 'C, H, W')))

    def forward(self, inputs: Mapping | Tensor, out_indices: Sequence[int] = ()):
        tokens = self.tokenize(inputs)
        return self.encode(tokens.x, tokens.pos, out_indices, prefix_pos=tokens.prefix_pos)


@MODELS.register_module()
class ClipPool(TokenPool):
    """A :class:`~ewa3d.models.necks.TokenPool` of every frame of a clip.

    Args:
        num_frames: T; ``TaskModel`` fills in its backbone's.
        mode, num_prefix_tokens: of ``TokenPool``; ``'cls'`` is ZeroI2V's.

    Shape:
        - ``(B·T, num_prefix_tokens + L, C)`` to ``(B, T, out_channels(C))``.

    Raises:
        ValueError: no ``num_frames`` (the backbone takes no clips); a number of frames that are no whole clips.
    """

    def __init__(self, mode: str = 'cls', num_frames: int | None = None, num_prefix_tokens: int = 1):
        super().__init__(mode, num_prefix_tokens)
        if num_frames is None:
            raise ValueError('ClipPool: num_frames is not set (TaskModel fills in that of a backbone of clips)')
        self.num_frames = check_integer('ClipPool: num_frames', num_frames, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.num_frames:
            raise ValueError(f'ClipPool: {x.shape[0]} frames are no whole clips of num_frames={self.num_frames}')
        return super().forward(x).unflatten(0, (-1, self.num_frames))


@MODELS.register_module()
class I3DHead(ClsHead):
    """Classification of clips: the mean of their frames, dropout and a linear layer (as I3D, Carreira and Zisserman
    2017, has it; ZeroI2V's head).

    Where there are more clips than samples, each sample has several views, one after the other: in training each has
    the sample's label, and predicted probabilities are averaged over them.

    Args:
        num_classes, in_channels, label_smoothing: of :class:`~ewa3d.models.heads.ClsHead`.
        dropout: before the linear layer.
        init_std: of the linear layer's weight.

    Shape:
        - feats ``(B·V, T, in_channels)``; logits ``(B·V, num_classes)``.

    Raises:
        ValueError: features of another shape, a number of clips that is no multiple of the samples'.
    """

    def __init__(self, num_classes: int | None = None, in_channels: int | None = None, label_smoothing: float = 0.,
                 dropout: float = 0.5, init_std: float = 0.01):
        super().__init__(num_classes, in_channels, 'linear', label_smoothing, dropout)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.layers[0].weight, std=check_number('I3DHead: init_std', init_std, '[0, inf)'))

    def forward(self, feats: Tensor) -> Tensor:
        if feats.ndim != 3 or feats.shape[2] != self.in_channels:
            raise ValueError(f'I3DHead: features (B, T, {self.in_channels}) expected, got {tuple(feats.shape)}; frames '
                             "are pooled by a neck, dict(type='ClipPool')")
        return self.layers(self.dropout(feats.mean(1)))

    def loss(self, feats: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        views = self._views(feats, samples)
        return super().loss(feats, [sample for sample in samples for _ in range(views)])

    def predict(self, feats: Tensor, samples: Sequence[Sample] | None = None) -> list[Sample]:
        views = 1 if samples is None else self._views(feats, samples)
        scores = self(feats).float().softmax(-1).unflatten(0, (-1, views)).mean(1).cpu()
        samples = [Sample() for _ in scores] if samples is None else list(samples)
        for sample, score in zip(samples, scores):
            sample.pred_scores, sample.pred_label = score, score.argmax()
        return samples

    @staticmethod
    def _views(feats: Tensor, samples: Sequence[Sample]) -> int:
        if not samples or len(feats) % len(samples):
            raise ValueError(f'I3DHead: {len(feats)} clips cannot be shared out to {len(samples)} samples')
        return len(feats) // len(samples)
