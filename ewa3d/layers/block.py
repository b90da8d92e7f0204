"""The transformer block: timm's parameter names and constructor signatures, with slots for the mixer and the FFN."""
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ewa3d.checks import check_integer, check_number
from ewa3d.ops.points import exporting

__all__ = ['Attention', 'Block', 'DropPath', 'LayerScale', 'Mlp', 'Pointwise', 'attend', 'init_vit',
           'pointwise']

WRITTEN_OUT = 2 ** 28  # attention weights; half a gigabyte in half precision, and training keeps several of them
ONEDNN = torch.backends.mkldnn.is_available()


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
           dropout_p: float = 0.) -> Tensor:
    """``scaled_dot_product_attention``, written out where torch's kernel is slow.

    On a CPU the kernel's backward in bf16 or fp16 costs five to nine times that of the plain products at the token
    counts of point clouds (see the operator table of ``tools/bench.py``), so training in them takes the plain products,
    up to the token counts where their memory is what is dear.

    Shape:
        - q ``(B, heads, L, D)``, k and v ``(B, heads, S, D)``; returns ``(B, heads, L, D)``.
    """
    low_precision = q.dtype in (torch.bfloat16, torch.float16)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    slow = q.device.type == 'cpu' and low_precision and needs_grad and attn_mask is None and not is_causal
    if slow and q.shape[:-1].numel() * k.shape[-2] <= WRITTEN_OUT:  # asked last: exported graphs leave the sizes open
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)  # (B, heads, L, S)
        return F.dropout(weights, dropout_p, training=dropout_p > 0) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal, dropout_p=dropout_p)


def init_vit(module: nn.Module) -> None:
    """A ViT's initialisation, for ``module.apply``: linear weights truncated normal (0.02), biases zero, norms one."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


class Pointwise(nn.Linear):
    """A linear layer that also loads the weight of a 1×1 convolution, which computes the same on rows.

    Shape:
        - ``(..., in_features)`` to ``(..., out_features)``.
    """

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        weight = state_dict.get(f'{prefix}weight')
        if isinstance(weight, Tensor) and weight.ndim > 2 and weight.shape[2:].numel() == 1:
            state_dict[f'{prefix}weight'] = weight.flatten(1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear map of the points of many patches.

    In float32 on a CPU it is computed as the 1×1 convolution that it is, on the same memory: torch leaves convolutions
    to oneDNN and matrix products to MKL, which is half as fast on an AMD CPU with AVX-512 (see the operator table of
    ``tools/bench.py``).

    Shape:
        - x ``(P, K, C)``, or any ``(..., C)``; weight ``(H, C)``, bias ``(H,)``; returns ``(..., H)``.
    """
    if _is_faster_as_convolution(x):
        y = F.conv2d(x.unsqueeze(2).permute(0, 3, 1, 2), weight[:, :, None, None], bias)  # (P, H, K, 1), channels last
        return y.permute(0, 2, 3, 1).squeeze(2)
    return F.linear(x, weight, bias)


def _is_faster_as_convolution(x: Tensor) -> bool:
    """Whether oneDNN gets to compute it then: on one thread torch has slower code for fewer than 16 patches. Exported
    graphs stay plain."""
    if exporting():
        return False
    patches = x.ndim == 3 and len(x) >= 16 and x.is_contiguous() and x.dtype == torch.float32
    return patches and ONEDNN and x.device.type == 'cpu' and not torch.is_autocast_enabled('cpu')


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, a sample's residual branch is dropped with ``drop_prob``
    and scaled by ``1 / (1 - drop_prob)`` where it is kept.

    Shape:
        - any ``(B, ...)``, kept.
    """

    def __init__(self, drop_prob: float = 0.):
        super().__init__()
        self.drop_prob = check_number('drop path rate', drop_prob, '[0, 1)')

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3g}'


class LayerScale(nn.Module):
    """A learnt factor for each channel of a residual branch (Touvron et al. 2021), ``init_values`` at first.

    Shape:
        - ``(..., dim)``, kept.
    """

    def __init__(self, dim: int, init_values: float = 1e-5, device=None, dtype=None):
        super().__init__()
        check_number('init_values', init_values, '(-inf, inf)')
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values), device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """The feed-forward network ``fc2(act(fc1(x)))`` (Vaswani et al. 2017), with timm's names and signature.

    Shape:
        - ``(..., in_features)`` to ``(..., out_features)``.
    """

    def __init__(self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
                 act_layer=nn.GELU, norm_layer=None, bias: bool = True, drop: float = 0., device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features, bias=bias, **factory)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm_layer(hidden_features, **factory) if norm_layer is not None else nn.Identity()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features, bias=bias, **factory)
        self.drop2 = nn.Dropout(drop)
        self.apply(init_vit)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(x))


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017) through ``scaled_dot_product_attention``: among the tokens of ``x``,
    or, with a ``context``, of ``x`` to that. The three projections are one layer, ``qkv``, in either case.

    ``pos`` is added to what queries (and, among the tokens of ``x``, keys) are made of, ``context_pos`` to what the
    keys of a context are made of; values see neither (Carion et al. 2020).

    Shape:
        - x, pos ``(B, L, dim)``, kept; context, context_pos ``(B, S, dim)``; ``attn_mask`` as
          ``scaled_dot_product_attention`` takes it.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_norm: bool = False,
                 scale_norm: bool = False, proj_bias: bool = True, attn_drop: float = 0., proj_drop: float = 0.,
                 norm_layer=nn.LayerNorm, device=None, dtype=None):
        super().__init__()
        check_integer('dim', dim, 1)
        if dim % check_integer('num_heads', num_heads, 1):
            raise ValueError(f'dim={dim} cannot be split among num_heads={num_heads}')
        factory = dict(device=device, dtype=dtype)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.q_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **factory) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim, **factory) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.apply(init_vit)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, pos: Tensor | None = None,
                context: Tensor | None = None, context_pos: Tensor | None = None) -> Tensor:
        if pos is None and context is None:
            q, k, v = self.split_heads(x).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self._separate(x, pos, *((x, pos) if context is None else (context, context_pos)))
        return self.mix(q, k, v, attn_mask, is_causal)

    def split_heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values: ``(B, L, dim)`` to ``(B, L, 3, heads, D)``."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        """Attention and projection: ``(B, heads, L, D)`` each to ``(B, L, dim)``."""
        x = attend(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal,
                   dropout_p=self.attn_drop.p if self.training else 0.)  # (B, heads, L, D)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))

    def _separate(self, x: Tensor, pos: Tensor | None, source: Tensor, source_pos: Tensor | None) -> list[Tensor]:
        """Queries, keys and values ``(B, heads, L or S, head_dim)`` of different inputs."""
        inputs = (x if pos is None else x + pos, source if source_pos is None else source + source_pos, source)
        return [self._part(i, value).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
                for i, value in enumerate(inputs)]

    def _part(self, i: int, x: Tensor) -> Tensor:
        """One third of ``qkv(x)``; of a plain linear layer, the others are not computed."""
        if type(self.qkv) is not nn.Linear:
            return self.qkv(x).chunk(3, -1)[i]
        weight, bias = self.qkv.weight.chunk(3)[i], self.qkv.bias
        return F.linear(x, weight, bias if bias is None else bias.chunk(3)[i])


class Block(nn.Module):
    """A pre-norm transformer block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``; with ``cross``, between the two
    ``x + cross(norm_cross(x), context)``, as in a decoder.

    The signature is that of timm's block, so this one fits into ``VisionTransformer(..., block_fn=Block)``, and timm's
    attentions and FFNs fit in here; weights of ViT, MAE, DINO, BEiT 3, Point-BERT, Point-MAE blocks load as they are.

    Args:
        scale_attn_norm, scale_mlp_norm: a norm before the last projection of the attention and of the FFN (BEiT 3).
        init_values: where given, both branches have a :class:`LayerScale`, ``ls1`` and ``ls2``.
        mlp_layer, attn_layer: called with timm's keywords.
        cross: a slot for attention to other tokens, ``cross``; ``attn_layer`` must take a ``context`` then.
        depth: the block's number, for attention layers that ask for it.

    Shape:
        - ``(B, L, dim)``, kept; context, context_pos ``(B, S, dim)``. Other keywords go to the attention among the
          tokens: ``attn_mask``, ``is_causal``, and ``pos``, which goes to both.

    Raises:
        TypeError, ValueError: a number out of range, or no number; a context without ``cross``, or the other way round.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4., qkv_bias: bool = False, qk_norm: bool = False,
                 scale_attn_norm: bool = False, scale_mlp_norm: bool = False, proj_bias: bool = True,
                 proj_drop: float = 0., attn_drop: float = 0., init_values: float | None = None, drop_path: float = 0.,
                 act_layer=nn.GELU, norm_layer=nn.LayerNorm, mlp_layer=Mlp, attn_layer=Attention, depth: int = 0,
                 cross: bool = False, device=None, dtype=None):
        super().__init__()
        check_number('mlp_ratio', mlp_ratio, '(0, inf)')
        factory = dict(device=device, dtype=dtype)
        self.norm1 = norm_layer(dim, **factory)
        attn_layer = _by_name(attn_layer)
        attn_options = dict(scale_norm=True) if scale_attn_norm else {}
        if 'depth' in inspect.signature(attn_layer).parameters:
            attn_options['depth'] = depth
        attn_options.update(num_heads=num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, proj_bias=proj_bias,
                            attn_drop=attn_drop, proj_drop=proj_drop, norm_layer=norm_layer)
        self.attn = attn_layer(dim, **attn_options, **factory)
        self.ls1 = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.cross = None
        if cross:
            self.norm_cross = norm_layer(dim, **factory)
            self.cross = attn_layer(dim, **attn_options, **factory)
            self.ls_cross = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
            self.drop_path_cross = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = mlp_layer(in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer,
                             norm_layer=norm_layer if scale_mlp_norm else None, bias=proj_bias, drop=proj_drop,
                             **factory)
        self.ls2 = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, context: Tensor | None = None, context_pos: Tensor | None = None,
                **attn_options) -> Tensor:
        if (context is None) != (self.cross is None):
            raise ValueError('this block attends to a context (cross=True), and none was given' if context is None else
                             'a context was given to a block without a slot for it; build it with cross=True')
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **attn_options)))
        if context is not None:
            attended = self.cross(self.norm_cross(x), context=context, context_pos=context_pos,
                                  pos=attn_options.get('pos'))
            x = x + self.drop_path_cross(self.ls_cross(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def _by_name(attn_layer):
    """timm also names attention layers; '' and 'attn' are the usual one."""
    if isinstance(attn_layer, str):
        if attn_layer not in ('', 'attn'):
            raise ValueError(f"attn_layer must be a class or 'attn', got {attn_layer!r}")
        return Attention
    return attn_layer
