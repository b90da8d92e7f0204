"""Pixels as a sequence: the backbone of sequential image classification."""
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import Attention
from ewa3d.layers.image_tokens import images_of, pair
from ewa3d.registry import MODELS

__all__ = ['MixerBlock', 'SequenceEncoder']


class MixerBlock(nn.Module):
    """A token mixer with a shortcut and, after it, a norm: ``norm(x + dropout(attn(x)))``, without an FFN.

    Shape:
        - ``(B, L, dim)``, kept.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.):
        super().__init__()
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.dropout = nn.Dropout1d(dropout)  # a channel in all tokens of a sample
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.attn(x).transpose(1, 2)).transpose(1, 2))


@MODELS.register_module()
class SequenceEncoder(nn.Module):
    """The pixels of images, row by row, as tokens: a linear map of each, then blocks of a mixer and a norm.

    The model of S4D's minimal recipe, once a rule has put that into the slot ``blocks.*.attn``. There is no positional
    embedding: such a mixer tells the order by itself, and the plain attention does not.

    Args:
        in_channels: of the image. embed_dim: C, width of a token.
        depth: number of blocks. num_heads: of the attention that a rule replaces.
        img_size: in pixels, a number or ``(height, width)``.
        dropout: behind each mixer, of whole channels.

    Shape:
        - ``inputs['img']`` (or a tensor) ``(B, in_channels, H, W)``; returns ``(B, H·W, embed_dim)``.

    Raises:
        KeyError, TypeError, ValueError: settings out of range or of another type; inputs without ``img``, or of another
            size.
    """
    num_prefix_tokens = 0

    def __init__(self, img_size: int | Sequence[int] = 32, in_channels: int = 3, embed_dim: int = 128, depth: int = 4,
                 num_heads: int = 4, dropout: float = 0.1):
        super().__init__()
        for name, value in (('in_channels', in_channels), ('embed_dim', embed_dim), ('depth', depth)):
            check_integer(f'SequenceEncoder: {name}', value, 1)
        check_number('SequenceEncoder: dropout', dropout, '[0, 1)')
        self.img_size = pair('img_size', img_size)
        self.in_channels = in_channels
        self.embed_dim = embed_dim
        self.embed = nn.Linear(in_channels, embed_dim)
        self.blocks = nn.ModuleList(MixerBlock(embed_dim, num_heads, dropout) for _ in range(depth))

    def forward(self, inputs: Mapping | Tensor) -> Tensor:
        img = images_of(inputs)
        if img.shape[1:] != (self.in_channels, *self.img_size):
            raise ValueError(f'images (B, {self.in_channels}, {self.img_size[0]}, {self.img_size[1]}) expected, got '
                             f'{tuple(img.shape)}; img_size and in_channels are those of the SequenceEncoder')
        x = self.embed(img.flatten(2).transpose(1, 2))  # (B, L, C)
        for block in self.blocks:
            x = block(x)
        return x
