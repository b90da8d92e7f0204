"""Linear adapters (ZeroI2V, arXiv 2310.01324): trained beside a frozen linear layer, merged into it afterwards."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.layers.channels import TokenBatchNorm
from ewa3d.layers.experts import EWAFFN
from ewa3d.registry import MODELS, nearest
from ewa3d.reparam import Reparam

__all__ = ['LinearAdapter']


class Bottleneck(nn.Module):
    """``x + scale * up(dropout(down(x)))``, without an activation: an affine map, and the identity at first.

    Args:
        num_experts: where given, the tensors have this leading dimension, each expert's the same.

    Shape:
        - ``(..., width)``, kept.
    """

    def __init__(self, width: int, rank: int, scale: float, dropout: float, bias: bool, num_experts: int | None,
                 device=None, dtype=None):
        super().__init__()
        self.scale = scale
        self.down = nn.Linear(width, rank, bias, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(rank, width, bias, device=device, dtype=dtype)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.up.weight)
        if bias:
            nn.init.zeros_(self.down.bias)
            nn.init.zeros_(self.up.bias)
        if num_experts is not None:
            for layer in (self.down, self.up):
                for name, value in list(layer.named_parameters()):
                    stacked = value.detach()[None].repeat(num_experts, *[1] * value.ndim)
                    setattr(layer, name, nn.Parameter(stacked))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.up(self.dropout(self.down(x)))


@MODELS.register_module()
class LinearAdapter(Reparam):
    """A linear layer with a linear bottleneck before or after it; :meth:`fuse` makes one linear layer of the two.

    The layer keeps its names (``attn.qkv.weight``); the bottleneck is at ``attn.qkv.adapter``. ZeroI2V has four in a
    block: before ``attn.qkv`` and ``mlp.fc1``, after ``attn.proj`` and ``mlp.fc2``. The module around must call the
    layer, not read its weight: attentions that put biases of their own there (timm's BEiT, EVA, Swin V2) are refused.

    In stacked experts (``mlp.fc1`` of an :class:`~ewa3d.layers.experts.EWAFFN`) each expert has a bottleneck, all equal
    at first; they are averaged with the experts, and the mean one is merged into the mean expert. An FFN whose layers
    have adapters may as well become experts itself.

    Build it with :meth:`expand`.

    Shape:
        - ``(..., in_features)`` to ``(..., out_features)``.
    """
    accepts = ('StackedExperts', 'STDHA', 'RePaBlock')

    def __init__(self, plain: nn.Linear, position: str, adapter: Bottleneck):
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.position = position
        for name in ('weight', 'bias'):
            value = getattr(plain, name)
            self.register_parameter(name, None if value is None else
                                    nn.Parameter(value.detach().clone(), requires_grad=value.requires_grad))
        self.adapter = adapter
        self.train(plain.training)

    @classmethod
    def check_place(cls, plain: nn.Module, around: list[nn.Module]) -> None:
        """Raise where the module around reads the layer's weight, or where training would refuse the adapter.

        Raises:
            ValueError: the ``qkv`` of an attention that keeps biases of queries and values by themselves; a layer of
                EWA's experts with a batch norm of all tokens.
        """
        parent = around[0]
        if getattr(parent, 'qkv', None) is plain and not getattr(parent, 'qkv_bias_separate', False) \
                and any(getattr(parent, name, None) is not None for name in ('q_bias', 'v_bias')):
            raise ValueError(f'{type(parent).__name__} reads the weight of this layer beside q_bias and v_bias instead '
                             'of calling it, so that an adapter would learn nothing; its proj can have one')
        for module in around:
            if isinstance(module, EWAFFN) and any(isinstance(m, TokenBatchNorm) for m in module.modules()):
                raise ValueError('experts that share a batch norm of all tokens run together, and adapters make each '
                                 "run by itself: use RePaFFN's norm-free form with adapters")

    @classmethod
    def expand(cls, plain: nn.Module, position: str = 'before', rank: int | None = None, ratio: float = 0.25,
               scale: float = 0.5, dropout: float = 0.1, bias: bool | None = None) -> 'LinearAdapter':
        """A linear layer with an adapter that does nothing yet.

        Args:
            plain: an ``nn.Linear``; a subclass is refused, because whoever uses one may read its weight.
            position: ``'before'`` or ``'after'`` the layer.
            rank: of the bottleneck. ratio: its share of the width that it stands in, where ``rank`` is not given.
            scale: of the bottleneck beside the identity (0.5 for Kinetics, UCF101 and HMDB51, 1 for Something v2).
            dropout: between its two layers.
            bias: of its two layers. By default as ``plain`` has it: with one beside a layer that has none, the fused
                layer needs a bias that the plain one does not have.

        Raises:
            TypeError: ``plain`` is no ``nn.Linear``, or a value of another type.
            ValueError: a value out of range, a rank above the width.
        """
        if type(plain) is not nn.Linear:
            raise TypeError(f'LinearAdapter stands beside an nn.Linear, got {type(plain).__name__}')
        if position not in ('before', 'after'):
            raise ValueError(f'position={position!r}: {nearest(position, ("before", "after"))}')
        check_number('scale', scale, '(-inf, inf)')
        check_number('dropout', dropout, '[0, 1)')
        width = plain.in_features if position == 'before' else plain.out_features
        if rank is None:
            rank = max(int(width * check_number('ratio', ratio, '(0, 1]')), 1)
        if check_integer('rank', rank, 1) > width:
            raise ValueError(f'rank={rank} is larger than the width {width} that the adapter stands in')
        weight = plain.weight
        experts = len(weight) if weight.ndim == 3 else None
        adapter = Bottleneck(width, rank, float(scale), float(dropout),
                             plain.bias is not None if bias is None else bool(bias), experts, weight.device,
                             weight.dtype)
        return cls(plain, position, adapter)

    def forward(self, x: Tensor) -> Tensor:
        if self.position == 'before':
            return F.linear(self.adapter(x), self.weight, self.bias)
        return self.adapter(F.linear(x, self.weight, self.bias))

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The linear layer that does both; in stacked experts one for each."""
        weight, bias = self._merged()
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device='meta')
        linear.weight = nn.Parameter(weight, self.weight.requires_grad)
        if bias is not None:
            flagged = self.weight if self.bias is None else self.bias
            linear.bias = nn.Parameter(bias, flagged.requires_grad)
        return linear.train(self.training)

    def _merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the fused layer; the products are those of every expert where there are some.

        With ``A(x) = (I + s U D) x + s (U d + u)``: before, ``W A(x) + b``; after, ``A(W x + b)``.
        """
        scale, down, up = self.adapter.scale, self.adapter.down, self.adapter.up
        weight, bias, (D, d), (U, u) = _wide(self.weight), _wide(self.bias), *(
            (_wide(layer.weight), _wide(layer.bias)) for layer in (down, up))
        shift = None if d is None else scale * (_product(U, d) + u)  # of an adapter with biases
        if self.position == 'before':
            merged = weight + scale * (weight @ U) @ D
            added = None if shift is None else _product(weight, shift)
        else:
            merged = weight + scale * U @ (D @ weight)
            of_bias = None if bias is None else scale * _product(U, _product(D, bias))
            added = _sum(of_bias, shift)
        bias, dtype = _sum(bias, added), self.weight.dtype
        return merged.to(dtype), None if bias is None else bias.to(dtype)

    def extra_repr(self) -> str:
        return (f'in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, '
                f'position={self.position!r}, scale={self.adapter.scale:g}')


def _wide(tensor: Tensor | None) -> Tensor | None:
    """Products of half-precision weights are taken in single precision."""
    return tensor.float() if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _product(matrix: Tensor, vector: Tensor) -> Tensor:
    """``(..., m, n)`` and ``(..., n)`` to ``(..., m)``."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other
