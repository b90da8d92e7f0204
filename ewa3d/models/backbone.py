"""Backbones: tokens in, features out; and the stack of blocks that they share with decoders."""
import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.block import Block, init_vit
from ewa3d.layers.checkpointing import checkpointed
from ewa3d.layers.modality import ModalityNorm, select_modality
from ewa3d.layers.serialize import Serializer
from ewa3d.registry import MODELS, nearest
from ewa3d.structures import Tokens

__all__ = ['TokenEncoder', 'TransformerStack', 'block_numbers']

MOST_BLOCKS = 10_000


class TransformerStack(nn.Module):
    """``blocks`` and a final ``norm``, with a positional embedding that is added again before every block, or once.

    A base class: a subclass calls :meth:`add_blocks` where its other parameters leave room for them.

    Attributes:
        grad_checkpointing: in training, compute the blocks' activations again in the backward pass instead of keeping
            them: less memory for one more forward pass (:func:`~ewa3d.layers.checkpointing.checkpointed`).
    """
    pos = 'every'
    grad_checkpointing = False

    def add_blocks(self, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float = 4., qkv_bias: bool = False,
                   drop_path_rate: float = 0., proj_drop: float = 0., attn_drop: float = 0.,
                   norm_eps: float = 1e-5) -> None:
        """Make the blocks; stochastic depth rises linearly from 0 in the first to ``drop_path_rate`` in the last.

        Raises:
            TypeError, ValueError: a number out of range, or no number.
        """
        where = type(self).__name__
        for name, value in (('embed_dim', embed_dim), ('depth', depth), ('num_heads', num_heads)):
            check_integer(f'{where}: {name}', value, 1)
        for name, value, within in (('mlp_ratio', mlp_ratio, '(0, inf)'), ('drop_path_rate', drop_path_rate, '[0, 1)'),
                                    ('proj_drop', proj_drop, '[0, 1]'), ('attn_drop', attn_drop, '[0, 1]'),
                                    ('norm_eps', norm_eps, '[0, inf)')):
            check_number(f'{where}: {name}', value, within)
        if depth > MOST_BLOCKS:  # before anything is made in proportion to a number that a file may have brought along
            raise ValueError(f'depth={depth} is more than {MOST_BLOCKS} blocks')
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, proj_drop=proj_drop, attn_drop=attn_drop, drop_path=rate)
            for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        for block in self.blocks:
            block.norm1.eps = block.norm2.eps = norm_eps
        self.norm.apply(init_vit)

    def run(self, x: Tensor, pos: Tensor, out_indices: Sequence[int] = (), norm: bool = True):
        """``x`` after all blocks, or a tuple of what the blocks ``out_indices`` give (see :meth:`TokenEncoder.encode`).

        Shape:
            - x, pos ``(B, L, C)``; returns ``(B, L, C)`` or a tuple of such.
        """
        wanted = self.block_numbers(out_indices)
        if self.pos == 'first':
            x = x + pos
        outputs = {}
        for i, block in enumerate(self.blocks):
            x = x + pos if self.pos == 'every' else x
            x = checkpointed(block, x) if self.grad_checkpointing and self.training else block(x)
            if i in wanted:
                outputs[i] = self.norm(x) if norm else x
                if len(outputs) == len(wanted):
                    return tuple(outputs[i] for i in wanted)
        return self.norm(x) if norm else x

    def block_numbers(self, out_indices: Sequence[int]) -> list[int]:
        """See the function :func:`block_numbers`."""
        return block_numbers(len(self.blocks), out_indices)


def block_numbers(depth: int, out_indices: Sequence[int]) -> list[int]:
    """The blocks ``out_indices`` of ``depth``, counted from 0; ``ValueError`` where one is not there or twice."""
    numbers = []
    for i in out_indices:
        if not isinstance(i, int) or not -depth <= i < depth:
            raise ValueError(f'out_indices={tuple(out_indices)}: {i!r} is not one of the {depth} blocks '
                             f'({-depth} to {depth - 1})')
        numbers.append(i % depth)
    if len(set(numbers)) < len(numbers):
        raise ValueError(f'out_indices={tuple(out_indices)} names a block twice')
    return numbers


@MODELS.register_module()
class TokenEncoder(TransformerStack):
    """A tokenizer and a pre-norm transformer: the encoder of Point-BERT, Point-MAE and, with ``pos='first'``, a ViT.

    Args:
        embed_dim: C, width of the tokens. depth: number of blocks. num_heads: of the attention, which share C.
        mlp_ratio: hidden width of an FFN, relative to ``embed_dim``. qkv_bias: whether ``attn.qkv`` has a bias.
        proj_drop, attn_drop: dropout in both branches, and of the attention weights.
        tokenizer: a module, or the config of one, that maps inputs to :class:`~ewa3d.structures.Tokens`; its
            ``embed_dim`` is filled in where the config leaves it out. Several of them, by the name of the input that
            they take, ``dict(points=dict(type=…), img=dict(type=…))``, share the blocks: each input has its own
            tokenizer, class token and class position.
        drop_path_rate: stochastic depth, rising linearly from 0 in the first block to this in the last.
        norm_eps: 1e-5 as Point-MAE has it; a ViT has 1e-6.
        pos: add the positional embedding before ``'every'`` block (Point-BERT, Point-MAE) or the ``'first'`` (ViT).
        cls_token: put a learnt token with a learnt position in front.
        modality_norms: with several tokenizers, each input has its own norms in the blocks and at the end, too.
        order: the curve along which the tokens are visited, for mixers that see a sequence (S4D), ``'random'`` to
            compare with, or several of them, one copy of the tokens after another: see
            :class:`~ewa3d.layers.serialize.Serializer`. As they come unless given.
        order_grid: side of the cells of the curve's grid.
        grad_checkpointing: see :class:`TransformerStack`; the tokenizer's activations are kept.

    Attributes:
        modalities: the names of several tokenizers; ``()`` where there is one.

    Shape:
        - inputs: what the tokenizer takes, e.g. ``dict(points=(B, N, 3))``; returns ``(B, 1 + L, C)``.

    Raises:
        KeyError: with several tokenizers, inputs that have none of their names, or two.
        ValueError: a tokenizer of another width, ``modality_norms`` with one tokenizer or with checkpointing.
    """

    def __init__(self, tokenizer: dict | nn.Module, embed_dim: int = 384, depth: int = 12, num_heads: int = 6,
                 mlp_ratio: float = 4., qkv_bias: bool = False, drop_path_rate: float = 0.1, proj_drop: float = 0.,
                 attn_drop: float = 0., norm_eps: float = 1e-5, pos: str = 'every', cls_token: bool = True,
                 modality_norms: bool = False, order: str | Sequence[str] | None = None, order_grid: float = 0.02,
                 grad_checkpointing: bool = False):
        super().__init__()
        if pos not in ('every', 'first'):
            raise ValueError(f"pos must be 'every' or 'first', got {pos!r}")
        check_integer('TokenEncoder: embed_dim', embed_dim, 1)
        several = isinstance(tokenizer, nn.ModuleDict) or (isinstance(tokenizer, Mapping) and 'type' not in tokenizer)
        self.modalities = tuple(tokenizer) if several else ()
        if modality_norms and not several:
            raise ValueError('TokenEncoder: modality_norms belong to several tokenizers, and there is one')
        self.tokenizer = nn.ModuleDict({name: _tokenizer(cfg, embed_dim) for name, cfg in tokenizer.items()}) \
            if several else _tokenizer(tokenizer, embed_dim)
        if modality_norms and grad_checkpointing:
            raise ValueError('TokenEncoder: grad_checkpointing does not go with modality_norms: a block would be '
                             'computed again with the norms of the modality that came last')
        self.grad_checkpointing = bool(grad_checkpointing)
        self.embed_dim = embed_dim
        self.pos = pos
        self.num_prefix_tokens = int(cls_token)
        if cls_token:
            self.cls_token, self.cls_pos = (self._per_modality(embed_dim) for _ in range(2))
        self.serializer = None if order is None else Serializer(order, embed_dim, order_grid)
        self.add_blocks(embed_dim, depth, num_heads, mlp_ratio, qkv_bias, drop_path_rate, proj_drop, attn_drop,
                        norm_eps)
        if modality_norms:
            for module in (*self.blocks, self):
                for name in ('norm1', 'norm2', 'norm'):
                    if isinstance(getattr(module, name, None), nn.LayerNorm):
                        norm = getattr(module, name)
                        setattr(module, name, ModalityNorm({key: copy.deepcopy(norm) for key in self.modalities}))

    def _per_modality(self, embed_dim: int) -> nn.Parameter | nn.ParameterDict:
        """A token, or one for each modality."""
        draw = lambda: nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))  # noqa: E731
        return nn.ParameterDict({name: draw() for name in self.modalities}) if self.modalities else draw()

    def modality_of(self, inputs) -> str | None:
        """Which of several tokenizers takes the inputs; ``None`` where there is one.

        Raises:
            KeyError, TypeError: none does, or two; no dict.
        """
        if not self.modalities:
            return None
        if not isinstance(inputs, Mapping):
            raise TypeError(f'inputs must be a dict with one of {", ".join(self.modalities)}, got '
                            f'{type(inputs).__name__}')
        found = [name for name in self.modalities if name in inputs]
        if len(found) != 1:
            raise KeyError(f'the inputs {sorted(map(str, inputs))} must have exactly one modality that the backbone '
                           f'has a tokenizer for: {", ".join(self.modalities)}')
        return found[0]

    def tokenize(self, inputs) -> Tokens:
        """Patch tokens of the inputs, without the class token, in their order."""
        modality = self.modality_of(inputs)
        tokens = (self.tokenizer if modality is None else self.tokenizer[modality])(inputs)
        return tokens if self.serializer is None else self.serializer(tokens)

    def encode(self, x: Tensor, pos: Tensor, out_indices: Sequence[int] = (), norm: bool = True,
               modality: str | None = None, prefix_pos: Tensor | None = None):
        """Features of tokens ``x`` at ``pos``; a masked model passes a part of the tokens.

        Args:
            out_indices: block numbers, negative ones counted from the end; where given, the result is a tuple with
                the output of each of these blocks, in this order.
            norm: apply the final norm, which all outputs share.
            modality: of the tokens, where there are several tokenizers.
            prefix_pos: ``(B, 1, C)``, added to the position of the class token.

        Shape:
            - x, pos ``(B, L, C)``; returns ``(B, num_prefix_tokens + L, C)`` or a tuple of such.

        Raises:
            ValueError: a block number that does not exist or occurs twice, a modality without tokenizer.
        """
        if (modality is not None or self.modalities) and modality not in self.modalities:
            raise ValueError(f'modality={modality!r} has no tokenizer; '
                             f'{nearest(modality, self.modalities) if self.modalities else "there is only one"}')
        if self.num_prefix_tokens:
            token, at = (p if modality is None else p[modality] for p in (self.cls_token, self.cls_pos))
            x = torch.cat([token.expand(x.shape[0], -1, -1).to(x.dtype), x], 1)
            at = at if prefix_pos is None else at + prefix_pos
            pos = torch.cat([at.expand(pos.shape[0], -1, -1).to(pos.dtype), pos], 1)
        if modality is not None:
            select_modality(self._own_norms(), modality)
        return self.run(x, pos, out_indices, norm)

    def located(self, inputs, out_indices: Sequence[int]) -> tuple[tuple[Tensor, ...], Tensor]:
        """:meth:`encode`'s features of some blocks, and where the tokens behind the prefix are, ``(B, L, D)``."""
        tokens = self.tokenize(inputs)
        return self._encoded(tokens, inputs, out_indices), tokens.coord

    def _own_norms(self) -> list[nn.Module]:
        return [self.norm, *(norm for block in self.blocks for norm in (block.norm1, block.norm2))]

    def forward(self, inputs, out_indices: Sequence[int] = ()):
        return self._encoded(self.tokenize(inputs), inputs, out_indices)

    def _encoded(self, tokens: Tokens, inputs, out_indices: Sequence[int]):
        return self.encode(tokens.x, tokens.pos, out_indices, modality=self.modality_of(inputs),
                           prefix_pos=tokens.prefix_pos)


def _tokenizer(cfg: Mapping | nn.Module, embed_dim: int) -> nn.Module:
    """The tokenizer of a config, with the width of the blocks."""
    tokenizer = cfg if isinstance(cfg, nn.Module) else MODELS.build({'embed_dim': embed_dim, **cfg})
    if getattr(tokenizer, 'embed_dim', embed_dim) != embed_dim:
        raise ValueError(f'the tokenizer makes tokens of embed_dim={tokenizer.embed_dim}, the blocks expect '
                         f'embed_dim={embed_dim}')
    return tokenizer
