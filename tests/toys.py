"""Plain FFNs and models of several makes, for the tests of expand and fuse."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ewa3d.layers.block import Mlp

__all__ = ['FFNS', 'MODELS', 'PLACES', 'HandWritten', 'BatchNormFFN', 'make_ffn', 'make_model', 'train_steps',
           'scramble']


class HandWritten(nn.Module):
    """Raw parameters, tied weights, a frozen parameter, a buffer and an integer buffer."""

    def __init__(self, dim: int = 12, hidden: int = 20):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(hidden, dim) * 0.3)
        self.tied = nn.Linear(dim, hidden)
        self.tied.weight = self.weight
        self.out = nn.Parameter(torch.randn(dim, hidden) * 0.3)
        self.gain = nn.Parameter(torch.full((dim,), 0.9), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.register_buffer('shift', torch.linspace(-1, 1, dim))
        self.register_buffer('hidden_shift', torch.ones(hidden), persistent=False)
        self.register_buffer('order', torch.arange(dim).flip(0))
        self.expand = nn.Identity()  # a child called like a method of Reparam

    def forward(self, x):
        x = self.expand(x)[..., self.order] * self.gain + self.shift
        return F.linear(F.silu(F.linear(x, self.weight) + self.hidden_shift) + self.tied(x), self.out) * self.scalar


class BatchNormFFN(nn.Module):
    """Batch statistics over tokens ``(B, L, C)``."""

    def __init__(self, dim: int = 12, hidden: int = 20):
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x).transpose(-1, -2)).transpose(-1, -2).relu())


def _timm_mlp(name: str):
    def make(dim: int = 12, hidden: int = 20, **kwargs):
        layers = pytest.importorskip('timm.layers')
        return getattr(layers, name)(dim, hidden, **kwargs)
    return make


def _torchvision_mlp(dim: int = 12, hidden: int = 20):
    return pytest.importorskip('torchvision.models.vision_transformer').MLPBlock(dim, hidden, 0.)


FFNS = {
    'ours': lambda dim=12, hidden=20: Mlp(dim, hidden),
    'ours, norm, no bias': lambda dim=12, hidden=20: Mlp(dim, hidden, bias=False, norm_layer=nn.LayerNorm),
    'ours, wider out': lambda dim=12, hidden=20: Mlp(dim, hidden, out_features=dim + 3),
    'linear': lambda dim=12, hidden=20: nn.Linear(dim, dim),
    'sequential': lambda dim=12, hidden=20: nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden),
                                                          nn.ReLU(inplace=True), nn.Linear(hidden, dim)),
    'hand-written': HandWritten,
    'batch norm': BatchNormFFN,
    'timm Mlp': _timm_mlp('Mlp'),
    'timm SwiGLU': _timm_mlp('SwiGLU'),
    'timm GluMlp': _timm_mlp('GluMlp'),
    'timm SwiGLUPacked': _timm_mlp('SwiGLUPacked'),
    'torchvision MLPBlock': _torchvision_mlp,
}


def make_ffn(name: str, dtype=torch.float64, **kwargs) -> nn.Module:
    return FFNS[name](**kwargs).to(dtype)


class OwnModel(nn.Module):
    """Residual blocks around any FFN."""

    def __init__(self, ffn, depth: int = 3, dim: int = 12):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict(dict(norm=nn.LayerNorm(dim), mlp=ffn())) for _ in range(depth))
        self.head = nn.Linear(dim, 5)
        self.example = (2, 7, dim)

    def forward(self, x):
        for block in self.blocks:
            x = x + block['mlp'](block['norm'](x))
        return self.head(x)


def _timm_vit(**kwargs):
    timm = pytest.importorskip('timm')
    if isinstance(kwargs.get('mlp_layer'), str):
        kwargs['mlp_layer'] = getattr(timm.layers, kwargs['mlp_layer'])
    model = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=5,
                                          mlp_ratio=2., **kwargs)
    model.example = (2, 3, 8, 8)
    return model


def _torchvision_vit():
    models = pytest.importorskip('torchvision.models')
    model = models.VisionTransformer(image_size=8, patch_size=4, num_layers=3, num_heads=2, hidden_dim=12, mlp_dim=20,
                                     num_classes=5)
    nn.init.normal_(model.heads.head.weight, std=0.2)  # zero by default
    model.example = (2, 3, 8, 8)
    return model


MODELS = {  # name -> (function, where its FFNs are)
    'own, ours': (lambda: OwnModel(FFNS['ours']), 'blocks.*.mlp'),
    'own, hand-written': (lambda: OwnModel(HandWritten), 'blocks.*.mlp'),
    'own, batch norm': (lambda: OwnModel(BatchNormFFN), 'blocks.*.mlp'),
    'timm ViT': (_timm_vit, 'blocks.*.mlp'),
    'timm ViT SwiGLU': (lambda: _timm_vit(mlp_layer='SwiGLU'), 'blocks.*.mlp'),
    'timm ViT GLU': (lambda: _timm_vit(mlp_layer='GluMlp'), 'blocks.*.mlp'),
    'torchvision ViT': (_torchvision_vit, 'encoder.layers.*.mlp'),
}


PLACES = {  # Reparams that do not go over FFNs -> model -> where, and the rest of the rule
    'LinearAdapter': {
        'own, ours': ('blocks.*.mlp.fc1', dict(scale=0.7)),
        'timm ViT': ('blocks.*.attn.qkv', dict(rank=3)),
        'timm ViT GLU': ('blocks.*.mlp.fc2', dict(position='after', ratio=0.5, dropout=0.)),
        'torchvision ViT': ('encoder.layers.*.mlp.3', dict(position='after')),
    },
    'STDHA': {
        'timm ViT': ('blocks.*.attn', dict(offsets=[1, -1], num_frames=2)),
    },
    'S4D': {
        'timm ViT': ('blocks.*.attn', dict(d_state=4, length=7)),
        'timm ViT SwiGLU': ('blocks.*.attn', dict(d_state=6, bidirectional=False, dropout=0.1)),
    },
    'S4': {
        'timm ViT': ('blocks.*.attn', dict(d_state=4, length=5)),
        'timm ViT GLU': ('blocks.*.attn', dict(d_state=4, length=5, bidirectional=False, num_ssm=2)),
    },
}


def make_model(name: str, dtype=torch.float64) -> tuple[nn.Module, str, torch.Tensor]:
    """A small model, the pattern of its FFNs and an input."""
    function, at = MODELS[name]
    model = function().to(dtype)
    return model, at, torch.randn(model.example, dtype=dtype)


def train_steps(model: nn.Module, x: torch.Tensor, steps: int = 3) -> None:
    """A few real optimizer steps; the model is left in training mode."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def scramble(module: nn.Module, std: float = 0.1) -> None:
    """Move every parameter, so that experts differ."""
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * std)
