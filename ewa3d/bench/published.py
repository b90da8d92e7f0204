"""Point-MAE's models in the form in which they are usually written: what ours are compared with.

The modules and names are those of the published weights, the values those of our model: 1×1 convolutions on
channels-first patches, the maximum of a patch repeated for each of its points, attention written out. Sampling and
grouping are ours.
"""
import copy

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ['NaiveClassifier', 'NaivePatchEncoder', 'blocks', 'position', 'scale_and_translate']


class NaivePatchEncoder(nn.Module):
    """The mini-PointNet: ``(P, K, 3)`` to ``(P, out_channels)``."""

    def __init__(self, out_channels: int, widths: tuple[int, int, int]):
        super().__init__()
        inner, middle, outer = widths
        self.first_conv = nn.Sequential(nn.Conv1d(3, inner, 1), nn.BatchNorm1d(inner), nn.ReLU(inplace=True),
                                        nn.Conv1d(inner, middle, 1))
        self.second_conv = nn.Sequential(nn.Conv1d(2 * middle, outer, 1), nn.BatchNorm1d(outer),
                                         nn.ReLU(inplace=True), nn.Conv1d(outer, out_channels, 1))

    def forward(self, patches: Tensor) -> Tensor:
        x = self.first_conv(patches.transpose(2, 1))  # (P, middle, K)
        shared = torch.max(x, dim=2, keepdim=True)[0]
        x = torch.cat([shared.expand(-1, -1, x.shape[2]), x], 1)
        return torch.max(self.second_conv(x), dim=2)[0]


class NaiveClassifier(nn.Module):
    """Point-MAE's classifier with ``model``'s values (a ``TaskModel`` of a ``TokenEncoder`` and an MLP head).

    Args:
        size: with ``dim``, ``depth``, ``heads`` and ``widths``, as ``model`` was built.

    Shape:
        - points ``(B, N, 3)``; returns logits ``(B, num_classes)``.
    """

    def __init__(self, model: nn.Module, size: dict, drop_path: float):
        from ewa3d.models.weights import rename
        super().__init__()
        dim = size['dim']
        self.group = model.backbone.tokenizer.group
        self.encoder = NaivePatchEncoder(dim, size['widths'])
        self.cls_token, self.cls_pos = (nn.Parameter(torch.zeros(1, 1, dim)) for _ in range(2))
        self.pos_embed = position(dim)
        self.blocks = nn.Module()
        self.blocks.blocks = blocks(size, size['depth'], drop_path)
        self.norm = nn.LayerNorm(dim)
        self.cls_head_finetune = copy.deepcopy(model.head.layers)
        self.load_state_dict(rename(model.state_dict(), 'point_mae', reverse=True))

    def forward(self, points: Tensor) -> Tensor:
        center, patches = self.group(points)
        B, G = center.shape[:2]
        tokens = self.encoder(patches.flatten(0, 1)).view(B, G, -1)
        x = torch.cat([self.cls_token.expand(B, -1, -1), tokens], 1)
        pos = torch.cat([self.cls_pos.expand(B, -1, -1), self.pos_embed(center)], 1)
        for block in self.blocks.blocks:
            x = block(x + pos)
        x = self.norm(x)
        return self.cls_head_finetune(torch.cat([x[:, 0], x[:, 1:].max(1)[0]], -1))


def scale_and_translate(points: Tensor) -> Tensor:
    """The published augmentation, in place: cloud by cloud, with factors and shifts that numpy draws on the host.

    Shape:
        - points ``(B, N, 3)``.
    """
    for cloud in points:
        factor, shift = np.random.uniform(2 / 3, 3 / 2, 3), np.random.uniform(-0.2, 0.2, 3)
        factor, shift = (torch.from_numpy(value).float().to(points.device) for value in (factor, shift))
        cloud[:, :3] = torch.mul(cloud[:, :3], factor) + shift
    return points


def position(dim: int) -> nn.Sequential:
    """The MLP of a centre's position."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))


def blocks(size: dict, depth: int, drop_path: float) -> nn.ModuleList:
    """Our blocks with attention as operations of their own."""
    from ewa3d.layers.block import Attention, Block

    class NaiveAttention(Attention):
        """All weights, softmax and products written out."""

        def forward(self, x: Tensor) -> Tensor:
            B, L, C = x.shape
            qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv[0], qkv[1], qkv[2]
            weights = ((q @ k.transpose(-2, -1)) * self.head_dim ** -0.5).softmax(-1)
            x = (weights @ v).transpose(1, 2).reshape(B, L, C)
            return self.proj_drop(self.proj(x))

    return nn.ModuleList(Block(size['dim'], size['heads'], drop_path=rate, attn_layer=NaiveAttention)
                         for rate in torch.linspace(0, drop_path, depth).tolist())
