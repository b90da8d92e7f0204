"""Clips to tokens: frames as rows, with an embedding of the time; of videos and of sequences of point clouds."""
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer
from ewa3d.layers.image_tokens import ImagePatchEmbed
from ewa3d.layers.tokenizers import PointPatchEmbed
from ewa3d.registry import MODELS
from ewa3d.structures import Tokens

__all__ = ['ClipTime', 'PointClipEmbed', 'VideoPatchEmbed', 'frames_of_backbone']


class ClipTime:
    """What everything that takes clips shares: their frames become rows, and each frame has a learnt embedding.

    A mixin for modules. The embedding, ``temporal_embed`` ``(1, T, embed_dim)``, is zero at first, so that a frame
    starts as the same frame does in the model of single images; it is added to the position of every token of the
    frame, the class token's too.
    """
    num_frames: int
    temporal_embed: nn.Parameter

    def add_time(self, num_frames: int, embed_dim: int) -> None:
        """Make ``temporal_embed`` ``(1, T, C)``, zero at first."""
        self.num_frames = check_integer(f'{type(self).__name__}: num_frames', num_frames, 1)
        self.temporal_embed = nn.Parameter(torch.zeros(1, num_frames, embed_dim))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed."""
        return {'temporal_embed'}

    def frames(self, inputs: Mapping | Tensor, key: str, dims: str) -> Tensor:
        """The frames of ``inputs[key]``, ``(B, T, …)`` or with views ``(B, V, T, …)``, as rows ``(B·V·T, …)``.

        Raises:
            KeyError, TypeError: inputs without ``key``, or no tensor. ValueError: another shape or number of frames.
        """
        ndim = dims.count(',') + 1
        clips = inputs
        if isinstance(inputs, Mapping):
            if key not in inputs:
                raise KeyError(f'the inputs need the key {key!r}, found {sorted(map(str, inputs))}')
            clips = inputs[key]
        if not isinstance(clips, Tensor):
            raise TypeError(f'{key} must be a tensor (B, T, {dims}), got {type(clips).__name__}')
        if clips.ndim not in (ndim + 2, ndim + 3) or clips.shape[-ndim - 1] != self.num_frames:
            raise ValueError(f'{key} must have the shape (B, {self.num_frames}, {dims}), clips of '
                             f'num_frames={self.num_frames}, or (B, V, {self.num_frames}, {dims}) with V views; got '
                             f'{tuple(clips.shape)}')
        return clips.flatten(0, -ndim - 1)

    def timed(self, tokens: Tokens) -> Tokens:
        """``tokens`` of frames, ``(B·T, L, C)``, with the time in their positions."""
        rows = tokens.x.shape[0]
        time = self.temporal_embed.expand(rows // self.num_frames, -1, -1).reshape(rows, 1, -1)  # (B·T, 1, C)
        return tokens._replace(pos=tokens.pos + time, prefix_pos=time)


@MODELS.register_module()
class VideoPatchEmbed(ClipTime, ImagePatchEmbed):
    """Clips to the patch tokens of their frames (ZeroI2V, arXiv 2310.01324).

    An :class:`~ewa3d.layers.image_tokens.ImagePatchEmbed` with a temporal embedding: the weights of an image model
    load, and give its tokens until the embedding is trained. Frames see each other where an attention has been
    expanded to an :class:`~ewa3d.layers.temporal.STDHA`.

    Args:
        num_frames: T, of a clip.
        **kwargs: of ``ImagePatchEmbed``.

    Shape:
        - ``inputs['video']`` (or a tensor) ``(B, T, in_channels, H, W)``, or ``(B, V, T, …)`` with V views.
        - returns :class:`~ewa3d.structures.Tokens` whose rows are frames, ``(B·T, L, C)``, the clip being the slower
          index, and ``prefix_pos`` ``(B·T, 1, C)``.

    Raises:
        KeyError, TypeError: inputs without ``video``, or no tensor. ValueError: another number of frames, size or
            number of channels.
    """

    def __init__(self, num_frames: int = 8, **kwargs):
        super().__init__(**kwargs)
        self.add_time(num_frames, self.embed_dim)

    def forward(self, inputs: Mapping | Tensor) -> Tokens:
        return self.timed(super().forward(self.frames(inputs, 'video', 'C, H, W')))


@MODELS.register_module()
class PointClipEmbed(ClipTime, PointPatchEmbed):
    """Sequences of clouds to the patch tokens of each: :class:`VideoPatchEmbed` for points.

    Tokens of different clouds have no order in common and need none: attention relates them.

    Args:
        num_frames: T, clouds in a clip.
        **kwargs: of :class:`~ewa3d.layers.tokenizers.PointPatchEmbed`.

    Shape:
        - ``inputs['points']`` (or a tensor) ``(B, T, N, in_channels)``, or ``(B, V, T, …)`` with V views.
        - returns :class:`~ewa3d.structures.Tokens` whose rows are clouds, as ``VideoPatchEmbed``'s are frames.

    Raises:
        KeyError, TypeError, ValueError: as ``VideoPatchEmbed`` and ``PointPatchEmbed``.
    """

    def __init__(self, num_frames: int = 8, **kwargs):
        super().__init__(**kwargs)
        self.add_time(num_frames, self.embed_dim)

    def forward(self, inputs: Mapping | Tensor) -> Tokens:
        return self.timed(super().forward(self.frames(inputs, 'points', 'N, C')))


def frames_of_backbone(backbone: nn.Module) -> int | None:
    """How many frames the clips of a backbone have; ``None`` where it takes single ones."""
    return getattr(backbone, 'num_frames', getattr(getattr(backbone, 'tokenizer', None), 'num_frames', None))
