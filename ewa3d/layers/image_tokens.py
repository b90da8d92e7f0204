"""Images to patch tokens, as in a ViT."""
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer
from ewa3d.registry import MODELS
from ewa3d.structures import Tokens

__all__ = ['ImagePatchEmbed', 'grid_coordinates', 'images_of']


@MODELS.register_module()
class ImagePatchEmbed(nn.Module):
    """Images to patch tokens (ViT, Dosovitskiy et al. 2021): a linear map of each patch, a learnt position.

    ``proj`` is timm's ``patch_embed.proj``; ``pos_embed`` are the positions of the patches alone, the class token's is
    the encoder's. A ViT adds them once: ``TokenEncoder(pos='first', qkv_bias=True, norm_eps=1e-6)``.

    Args:
        embed_dim: C, width of a token.
        img_size, patch_size: in pixels, a number or ``(height, width)``.
        in_channels: of the image.

    Shape:
        - ``inputs['img']`` (or a tensor) ``(B, in_channels, H, W)``.
        - returns :class:`~ewa3d.structures.Tokens` with ``L`` patches, row by row, and ``coord`` ``(B, L, 2)``, their
          centres as (y, x) in ``[-1, 1]``.

    Raises:
        KeyError, TypeError: inputs without ``img``, or no tensor. ValueError: another size or number of channels, an
            image size that is no multiple of the patch size.
    """

    def __init__(self, img_size: int | Sequence[int] = 224, patch_size: int | Sequence[int] = 16,
                 in_channels: int = 3, embed_dim: int = 384):
        super().__init__()
        self.img_size, self.patch_size = pair('img_size', img_size), pair('patch_size', patch_size)
        for name, value in (('in_channels', in_channels), ('embed_dim', embed_dim)):
            check_integer(f'ImagePatchEmbed: {name}', value, 1)
        if any(size % patch for size, patch in zip(self.img_size, self.patch_size)):
            raise ValueError(f'ImagePatchEmbed: img_size={self.img_size} is no multiple of '
                             f'patch_size={self.patch_size}')
        self.grid_size = tuple(size // patch for size, patch in zip(self.img_size, self.patch_size))
        self.in_channels = in_channels
        self.embed_dim = embed_dim
        self.proj = nn.Conv2d(in_channels, embed_dim, self.patch_size, self.patch_size)
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)
        L = self.grid_size[0] * self.grid_size[1]
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, L, embed_dim), std=0.02))
        self.register_buffer('coord', grid_coordinates(self.grid_size), persistent=False)

    def forward(self, inputs: Mapping | Tensor) -> Tokens:
        img = images_of(inputs)
        B = img.shape[0]
        if img.shape[1:] != (self.in_channels, *self.img_size):
            raise ValueError(f'images (B, {self.in_channels}, {self.img_size[0]}, {self.img_size[1]}) expected, got '
                             f'{tuple(img.shape)}; the pipeline resizes them, img_size and in_channels are the '
                             "tokenizer's")
        x = self.proj(img).flatten(2).transpose(1, 2)  # (B, L, C)
        return Tokens(x, self.pos_embed.expand(B, -1, -1), self.coord.expand(B, -1, -1))


def pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """A height and a width; one number is both."""
    values = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value, value)
    if len(values) != 2:
        raise ValueError(f'ImagePatchEmbed: {name} is a number or (height, width), got {value!r}')
    return tuple(check_integer(f'ImagePatchEmbed: {name}', v, 1) for v in values)


def grid_coordinates(grid_size: tuple[int, int]) -> Tensor:
    """Centres of the cells of a grid over ``[-1, 1]²``, row by row, ``(1, L, 2)``."""
    y, x = ((torch.arange(size) + 0.5) * (2 / size) - 1 for size in grid_size)
    return torch.cartesian_prod(y, x)[None]


def images_of(inputs: Mapping | Tensor) -> Tensor:
    """The images of ``dict(img=...)``, or the tensor itself.

    Raises:
        KeyError, TypeError, ValueError: inputs without ``img``, no tensor, another number of dimensions.
    """
    img = inputs
    if isinstance(inputs, Mapping):
        if 'img' not in inputs:
            raise KeyError(f"the inputs need the key 'img', found {sorted(map(str, inputs))}")
        img = inputs['img']
    if not isinstance(img, Tensor):
        raise TypeError(f'img must be a tensor (B, C, H, W) or dict(img=...), got {type(img).__name__}')
    if img.ndim != 4:
        raise ValueError(f'img must have the shape (B, C, H, W), got {tuple(img.shape)}')
    return img
