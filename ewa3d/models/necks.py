"""Necks: token features to what a head takes."""
import torch
from torch import Tensor, nn

from ewa3d.ops import patch_max
from ewa3d.registry import MODELS

__all__ = ['TokenPool']

_PARTS = ('cls', 'max', 'mean')


@MODELS.register_module()
class TokenPool(nn.Module):
    """Tokens to one vector: the class token, the maximum and the mean of the patch tokens, joined in the order named.

    Args:
        mode: ``'cls'``, ``'max'``, ``'mean'`` or several with ``+``; Point-BERT and Point-MAE use ``'cls+max'``.
        num_prefix_tokens: how many tokens come before the patch tokens; ``TaskModel`` fills in the backbone's number.

    Shape:
        - ``(B, num_prefix_tokens + L, C)`` to ``(B, out_channels(C))``.

    Raises:
        ValueError: another mode, or one with ``'cls'`` where there is no class token.
    """

    def __init__(self, mode: str = 'cls+max', num_prefix_tokens: int = 1):
        super().__init__()
        self.parts = mode.split('+')
        if len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(_PARTS):
            raise ValueError(f'mode={mode!r} must name some of {", ".join(_PARTS)}, each once, joined by +')
        if 'cls' in self.parts and num_prefix_tokens < 1:
            raise ValueError(f'mode={mode!r} needs a class token, and the backbone has none (cls_token=False)')
        self.num_prefix_tokens = num_prefix_tokens

    def out_channels(self, embed_dim: int) -> int:
        """Width of the result for tokens of width ``embed_dim``."""
        return len(self.parts) * embed_dim

    def forward(self, x: Tensor) -> Tensor:
        patches = x[:, self.num_prefix_tokens:]
        pooled = {'cls': lambda: x[:, 0], 'max': lambda: patch_max(patches), 'mean': lambda: patches.mean(1)}
        return torch.cat([pooled[part]() for part in self.parts], -1)

    def extra_repr(self) -> str:
        return f'mode={"+".join(self.parts)!r}, num_prefix_tokens={self.num_prefix_tokens}'
