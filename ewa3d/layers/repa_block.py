"""Whole blocks whose FFN is channel-idle: the norm and the shortcut of its branch fold with it."""
import copy

import torch
from torch import Tensor, nn

from ewa3d.layers.channels import TokenBatchNorm
from ewa3d.layers.folding import FoldedFFN, check_eval, fold
from ewa3d.layers.stacked import Experts
from ewa3d.reparam import Fused, Reparam

__all__ = ['FoldedBlock', 'RePaBlock']


class _FirstHalf(nn.Module):
    """A block's first half, as it was: ``x + drop_path1(ls1(attn(norm1(x))))``.

    Where a block has a method ``_attn`` around its attention (the windows of timm's Swin), that method runs on a
    stand-in of the block, which has the block's settings and shares the children and buffers of this module.
    """

    def take_half(self, block: nn.Module) -> None:
        for name in ('norm1', 'attn', 'ls1', 'drop_path1'):
            self.add_module(name, copy.deepcopy(getattr(block, name, None)) or nn.Identity())
        plain = vars(block).get('_around_attn', block)
        self.__dict__['_around_attn'] = standin = object.__new__(type(plain)) if hasattr(plain, '_attn') else None
        if standin is not None:
            for name, buffer in block._buffers.items():
                self.register_buffer(name, copy.deepcopy(buffer), name not in block._non_persistent_buffers_set)
            nn.Module.__init__(standin)
            standin.__dict__.update({k: copy.deepcopy(v) for k, v in vars(plain).items() if not k.startswith('_')})
            standin.__dict__.update({kind: self.__dict__[kind] for kind in ('_parameters', '_buffers', '_modules')})

    def first_half(self, x: Tensor, options: dict) -> Tensor:
        return _first_half(self, x, options, self._around_attn)


def _first_half(block: nn.Module, x: Tensor, options: dict, around_attn: nn.Module | None) -> Tensor:
    y = block.norm1(x)
    y = block.attn(y, **options) if around_attn is None else around_attn._attn(y, **options)
    return x + block.drop_path1(block.ls1(y))


class RePaBlock(_FirstHalf, Reparam):
    """A pre-norm block whose FFN branch can be folded with its norm and its shortcut.

    ``norm2`` becomes a batch norm over tokens with the layer norm's weight and bias, the FFN a :class:`RePaFFN` with
    one of its own. :class:`RePaFFN` makes it, by a rule that names blocks.

    Args:
        block: with ``norm1 attn norm2 mlp`` and, where it has them, ``ls1 ls2 drop_path1 drop_path2``, as a plain ViT
            or timm's Swin has it.
        mlp: its new FFN.

    Shape:
        - x ``(B, L, C)``, of a Swin ``(B, H, W, C)``, kept; options go to ``attn``.

    Raises:
        TypeError: a block that lacks one of these or computes something else.
    """
    preserves = False
    has_fused_form = True

    def __init__(self, block: nn.Module, mlp: nn.Module):
        super().__init__()
        _check_block(block)
        self.take_half(block)
        weight = mlp.fc1.weight
        self.norm2 = TokenBatchNorm(weight.shape[1], device=weight.device, dtype=weight.dtype)
        old = block.norm2
        for key in ('weight', 'bias'):
            value, own = getattr(old, key, None), getattr(self.norm2, key)
            if value is not None:
                own.data.copy_(value.detach())
                own.requires_grad_(value.requires_grad)
        self.mlp = mlp
        for name in ('ls2', 'drop_path2'):
            self.add_module(name, copy.deepcopy(getattr(block, name, None)) or nn.Identity())

    def forward(self, x: Tensor, **attn_options) -> Tensor:
        x = self.first_half(x, attn_options)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def fuse(self) -> 'FoldedBlock':
        """The block with three linear maps in place of norm, FFN and shortcut.

        Raises:
            ValueError: in training mode.
        """
        check_eval(self)
        mlp = self.mlp
        while isinstance(mlp, Experts):
            mlp = mlp.fuse()
        return FoldedBlock(self, fold(mlp, self.norm2, getattr(self.ls2, 'gamma', None), shortcut=True))


class FoldedBlock(_FirstHalf, Fused):
    """A block whose FFN branch, shortcut included, is one :class:`FoldedFFN`.

    Shape:
        - ``(B, L, C)``, or a Swin's ``(B, H, W, C)``; kept.
    """

    def __init__(self, block: RePaBlock, mlp: FoldedFFN):
        super().__init__()
        self.take_half(block)
        self.mlp = mlp
        self.train(block.training)

    def forward(self, x: Tensor, **attn_options) -> Tensor:
        return self.mlp(self.first_half(x, attn_options))


@torch.no_grad()
def _check_block(block: nn.Module) -> None:
    """Raise where ``block`` is not the sum of its input, the attention branch and the FFN branch."""
    name = type(block).__name__
    lacking = [part for part in ('norm1', 'attn', 'norm2', 'mlp')
               if not isinstance(getattr(block, part, None), nn.Module)]
    if lacking:
        raise TypeError(f'RePaFFN needs an FFN or a block with norm1, attn, norm2 and mlp; {name} lacks '
                        f'{", ".join(lacking)}')
    wanted = f'RePaFFN needs a block that adds attn(norm1(x)) and mlp(norm2(x)) to its input; {name}'
    instead = "; the norm-free form goes over its FFN alone: name the block's mlp in the rule"
    if not isinstance(block.norm2, nn.LayerNorm) or len(block.norm2.normalized_shape) != 1:
        raise TypeError(f'{wanted} has a {type(block.norm2).__name__} as norm2, where a LayerNorm was expected')
    trial = copy.deepcopy(block).eval()
    for part in ('ls1', 'ls2', 'drop_path1', 'drop_path2'):
        if not hasattr(trial, part):
            trial.add_module(part, nn.Identity())
    like = next(trial.mlp.parameters())
    windows = hasattr(trial, '_attn')
    places = tuple(getattr(trial, 'input_resolution', ())) if windows else ()
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(1, *(places or (3,)), block.norm2.normalized_shape[0]).to(like)
    try:
        y = trial(x)
        z = _first_half(trial, x, {}, trial if windows else None)
        z = z + trial.drop_path2(trial.ls2(trial.mlp(trial.norm2(z))))
        same = torch.allclose(y, z, 1e-3, 1e-3)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise TypeError(f'{wanted} does not take {tuple(x.shape)} by itself{instead}') from error
    if not same:
        raise TypeError(f'{wanted} computes something else{instead}')
