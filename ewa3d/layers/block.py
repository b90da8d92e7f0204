"""The transformer block: timm's parameter names and constructor signatures, with slots for the mixer and the FFN."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['Attention', 'Block', 'DropPath', 'Mlp', 'attend', 'init_vit']


def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
           dropout_p: float = 0.) -> Tensor:
    """``scaled_dot_product_attention``, written out where torch's kernel is slow.

    On a CPU the kernel's backward in bf16 or fp16 costs five to nine times that of the plain products at the token
    counts of point clouds (see the operator table of ``tools/bench.py``), so training in them takes the plain products.

    Shape:
        - q ``(B, heads, L, D)``, k and v ``(B, heads, S, D)``; returns ``(B, heads, L, D)``.
    """
    low_precision = q.dtype in (torch.bfloat16, torch.float16)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.device.type == 'cpu' and low_precision and needs_grad and attn_mask is None and not is_causal:
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


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training, a sample's residual branch is dropped with ``drop_prob``
    and scaled by ``1 / (1 - drop_prob)`` where it is kept.

    Shape:
        - any ``(B, ...)``, kept.
    """

    def __init__(self, drop_prob: float = 0.):
        super().__init__()
        if not 0 <= drop_prob < 1:
            raise ValueError(f'drop path rate must lie in [0, 1), got {drop_prob}')
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3g}'


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
    """Multi-head self-attention (Vaswani et al. 2017) through ``scaled_dot_product_attention``.

    Shape:
        - x ``(B, L, dim)``, kept; ``attn_mask`` as ``scaled_dot_product_attention`` takes it.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``.
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_norm: bool = False,
                 scale_norm: bool = False, proj_bias: bool = True, attn_drop: float = 0., proj_drop: float = 0.,
                 norm_layer=nn.LayerNorm, device=None, dtype=None):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
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

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        B, L, C = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = attend(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask, is_causal=is_causal,
                   dropout_p=self.attn_drop.p if self.training else 0.)  # (B, heads, L, head_dim)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).reshape(B, L, C))))


class Block(nn.Module):
    """A pre-norm transformer block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``.

    ``attn_layer`` and ``mlp_layer`` are called with timm's keywords, so a timm layer fits in here and these fit into
    ``timm.create_model(..., mlp_layer=...)``; weights of ViT, MAE, DINO, Point-BERT, Point-MAE blocks load as they are.

    Shape:
        - ``(B, L, dim)``, kept.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4., qkv_bias: bool = False, qk_norm: bool = False,
                 proj_bias: bool = True, proj_drop: float = 0., attn_drop: float = 0., drop_path: float = 0.,
                 act_layer=nn.GELU, norm_layer=nn.LayerNorm, mlp_layer=Mlp, attn_layer=Attention,
                 device=None, dtype=None):
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        self.norm1 = norm_layer(dim, **factory)
        self.attn = attn_layer(dim, num_heads=num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, proj_bias=proj_bias,
                               attn_drop=attn_drop, proj_drop=proj_drop, norm_layer=norm_layer, **factory)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim, **factory)
        self.mlp = mlp_layer(in_features=dim, hidden_features=int(dim * mlp_ratio), act_layer=act_layer,
                             bias=proj_bias, drop=proj_drop, **factory)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
