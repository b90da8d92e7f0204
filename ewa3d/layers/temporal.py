"""Attention over neighbouring frames at no cost: some heads read the keys and values of another frame."""
import copy
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer, is_integer
from ewa3d.layers.block import Attention
from ewa3d.registry import MODELS
from ewa3d.reparam import Reparam

__all__ = ['STDHA', 'bind_frames', 'shift_heads']


def shift_heads(x: Tensor, offsets: Sequence[int]) -> Tensor:
    """Each head of frame ``t`` as it is in frame ``t + offset``; where there is no such frame, its own.

    Shape:
        - x ``(B, T, ..., heads, D)``, one offset a head; kept.
    """
    T = x.shape[1]
    runs = [(offset, len(list(heads))) for offset, heads in groupby(o if abs(o) < T else 0 for o in offsets)]
    if all(offset == 0 for offset, _ in runs):
        return x
    parts = x.split([count for _, count in runs], -2)
    return torch.cat([_shifted(part, offset, T) for part, (offset, _) in zip(parts, runs)], -2)


def _shifted(x: Tensor, offset: int, T: int) -> Tensor:
    if offset > 0:
        return torch.cat([x[:, offset:], x[:, T - offset:]], 1)
    return torch.cat([x[:, :-offset], x[:, :offset]], 1) if offset else x


@MODELS.register_module()
class STDHA(Reparam, Attention):
    """Spatial-temporal dual-headed attention (ZeroI2V, arXiv 2310.01324).

    Every frame of a clip attends to itself, as in an image model, but the keys and values of head ``h`` are those of
    the frame ``offsets[h]`` later (earlier where negative). A frame that has no such neighbour takes its own. There are
    no parameters beyond the attention's, under the same names, and no further products.

    A published ViT-B (12 heads) has ``[-1, 1] + [0] * 10``, with long shifts ``[-1, 1, -2, 2] + [0] * 8``; a ViT-L
    (16 heads) ``[-1, -1, 1, 1] + [0] * 12``.

    Args:
        offsets: one integer a head.
        num_frames: T, for input whose rows are frames; :class:`~ewa3d.models.task.TaskModel` fills in its backbone's.
        **kwargs: of :class:`~ewa3d.layers.block.Attention`.

    Shape:
        - ``(B·T, L, dim)``, the clip being the slower index, or ``(B, T, L, dim)`` with any T; kept.

    Raises:
        ValueError: another number of offsets than heads, ``dim`` not a multiple of ``num_heads``, rows that are no
            whole clips, a number of frames that is not set. TypeError: offsets that are no integers.
    """
    preserves = False
    accepts = ('RePaBlock',)

    def __init__(self, dim: int, num_heads: int, offsets: Sequence[int], num_frames: int | None = None, **kwargs):
        Attention.__init__(self, dim, num_heads, **kwargs)
        self.offsets = check_offsets(offsets, num_heads)
        self.num_frames = None if num_frames is None else check_integer('STDHA: num_frames', num_frames, 1)

    @classmethod
    def expand(cls, plain: nn.Module, offsets: Sequence[int], num_frames: int | None = None) -> 'STDHA':
        """The same attention, its heads at ``offsets``; its layers may have adapters.

        Raises:
            TypeError: an attention without the layers ``qkv`` and ``proj`` of ours and timm's, or with others.
        """
        children = {name for name, child in plain.named_children() if child is not None}
        heads = getattr(plain, 'num_heads', None)
        if not children <= set(_LAYERS) or not children >= {'qkv', 'proj'} or not is_integer(heads) \
                or next(plain.parameters(recurse=False), None) is not None:
            raise TypeError(f'STDHA takes an attention with the layers {", ".join(_LAYERS)}; {type(plain).__name__} '
                            f'has {", ".join(sorted(children)) or "none"}')
        inner = plain.qkv.out_features // 3
        module = cls(inner, heads, offsets, num_frames, device='meta')
        for name in _LAYERS:
            setattr(module, name, copy.deepcopy(getattr(plain, name, None)) or nn.Identity())
        module.attn_drop = module.attn_drop if isinstance(module.attn_drop, nn.Dropout) else nn.Dropout(0.)
        module.training = plain.training
        return module

    def fuse(self) -> 'STDHA':
        """Stays: it costs what the plain attention costs."""
        return self

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if x.ndim == 4:
            frames = self._over_clips(x.flatten(0, 1), x.shape[1], attn_mask, is_causal)
            return frames.unflatten(0, x.shape[:2])
        if self.num_frames is None:
            raise ValueError('STDHA: num_frames is not set, and the rows of (B·T, L, C) do not tell the clips apart: '
                             'give it in the rule, or pass (B, T, L, C)')
        return self._over_clips(x, self.num_frames, attn_mask, is_causal)

    def _over_clips(self, x: Tensor, T: int, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if x.shape[0] % T:
            raise ValueError(f'STDHA: {x.shape[0]} frames are no whole clips of num_frames={T}')
        q, kv = self.split_heads(x).split([1, 2], 2)  # (B·T, L, 1 or 2, heads, D)
        kv = shift_heads(kv.unflatten(0, (-1, T)), self.offsets).flatten(0, 1)
        q, k, v = (y.transpose(1, 2) for y in (q.squeeze(2), *kv.unbind(2)))
        return self.mix(q, k, v, attn_mask, is_causal)

    def extra_repr(self) -> str:
        return f'num_heads={self.num_heads}, offsets={list(self.offsets)}, num_frames={self.num_frames}'


_LAYERS = ('qkv', 'q_norm', 'k_norm', 'attn_drop', 'norm', 'proj', 'proj_drop')


def check_offsets(offsets: Sequence[int], num_heads: int) -> tuple[int, ...]:
    """``offsets``, if they are one integer a head."""
    if isinstance(offsets, str) or not isinstance(offsets, Sequence) or not all(map(is_integer, offsets)):
        raise TypeError(f'offsets is a list of integers, one a head, got {offsets!r}')
    if len(offsets) != num_heads:
        raise ValueError(f'offsets={list(offsets)} are {len(offsets)}, and the attention has {num_heads} heads: one '
                         'a head was expected')
    return tuple(map(int, offsets))


def bind_frames(model: nn.Module, num_frames: int | None) -> None:
    """Tell every :class:`STDHA` in ``model`` how many frames a clip has.

    Raises:
        ValueError: one was told another number, or the backbone takes no clips and one was told nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, STDHA):
            if num_frames is None and module.num_frames is None:
                raise ValueError(f'{name} is an STDHA without num_frames, and the backbone has none either: it takes '
                                 'single frames; a tokenizer of clips (VideoPatchEmbed, PointClipEmbed) was expected')
            if module.num_frames is None:
                module.num_frames = num_frames
            elif num_frames is not None and module.num_frames != num_frames:
                raise ValueError(f'{name} has num_frames={module.num_frames}, the backbone takes clips of '
                                 f'num_frames={num_frames}')
