"""Whole pretraining steps of Point-MAE: ours against the same maths in the form in which it is usually written."""
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from ewa3d.bench.harness import Case, Settings
from ewa3d.bench.published import NaivePatchEncoder, blocks, position

__all__ = ['NaivePointMAE', 'autoencoder', 'cases']

FULL = dict(batch=128, points=1024, num_groups=64, group_size=32, dim=384, depth=12, heads=6, decoder_depth=4,
            widths=(128, 256, 512))
QUICK = dict(batch=4, points=64, num_groups=8, group_size=8, dim=16, depth=2, heads=2, decoder_depth=1,
             widths=(8, 16, 16))
MASK_RATIO, DROP_PATH = 0.6, 0.1


def cases(settings: Settings) -> Iterator[Case]:
    """Forward, Chamfer loss, backward and AdamW, on the same weights and clouds; grouping is ours in both."""
    size = QUICK if settings.quick else FULL
    for dtype in settings.dtypes:
        name = (f'pretraining step {size["depth"]} + {size["decoder_depth"]} × {size["dim"]}, {size["num_groups"]} '
                f'groups × {size["group_size"]}, {MASK_RATIO:.0%} masked, batch {size["batch"]}, {dtype}')
        yield Case(name, {'naive': _step(settings, size, dtype, naive=True), 'ewa3d': _step(settings, size, dtype)})


def _step(settings: Settings, size: dict, dtype: str, naive: bool = False):
    def build():
        model = autoencoder(size)
        model = (NaivePointMAE(model, size) if naive else model).to(settings.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
        points = torch.randn(size['batch'], size['points'], 3, device=settings.device)

        def step():
            with settings.autocast(dtype):
                loss = model(points) if naive else model(dict(points=points), mode='loss')['loss_chamfer']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return step
    return build


def autoencoder(size: dict, drop_path: float = DROP_PATH) -> nn.Module:
    """Our model of these sizes."""
    from ewa3d.registry import MODELS
    tokenizer = dict(type='PointPatchEmbed', num_groups=size['num_groups'], group_size=size['group_size'],
                     widths=size['widths'])
    backbone = dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=size['dim'], depth=size['depth'],
                    num_heads=size['heads'], drop_path_rate=drop_path)
    return MODELS.build(dict(type='MaskedAutoencoder', backbone=backbone, decoder_depth=size['decoder_depth'],
                             decoder_num_heads=size['heads'], mask_ratio=MASK_RATIO, drop_path_rate=drop_path))


class NaivePointMAE(nn.Module):
    """Point-MAE with the modules and names of its published weights, and ``model``'s values.

    The parts of :mod:`ewa3d.bench.published`, masks drawn by numpy cloud by cloud, boolean indexing, and a Chamfer
    distance whose graph holds all pairs.

    Shape:
        - points ``(B, N, 3)``, mask bool ``(B, G)`` where given; returns the loss.
    """

    def __init__(self, model: nn.Module, size: dict, drop_path: float = DROP_PATH):
        from ewa3d.models.weights import rename
        super().__init__()
        dim = size['dim']
        self.group = model.backbone.tokenizer.group
        self.num_masked = int(MASK_RATIO * size['num_groups'])
        encoder = nn.Module()
        encoder.encoder = NaivePatchEncoder(dim, size['widths'])
        encoder.pos_embed = position(dim)
        encoder.blocks = nn.Module()
        encoder.blocks.blocks = blocks(size, size['depth'], drop_path)
        encoder.norm = nn.LayerNorm(dim)
        self.MAE_encoder = encoder
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder_pos_embed = position(dim)
        self.MAE_decoder = nn.Module()
        self.MAE_decoder.blocks = blocks(size, size['decoder_depth'], drop_path)
        self.MAE_decoder.norm = nn.LayerNorm(dim)
        self.increase_dim = nn.Sequential(nn.Conv1d(dim, 3 * size['group_size'], 1))
        self.load_state_dict(rename(model.state_dict(), 'point_mae_pretrain', reverse=True))

    def forward(self, points: Tensor, mask: Tensor | None = None) -> Tensor:
        center, patches = self.group(points)
        B, G, K, _ = patches.shape
        mask = self._mask(B, G).to(points.device) if mask is None else mask
        tokens = self.MAE_encoder.encoder(patches.flatten(0, 1)).view(B, G, -1)
        C = tokens.shape[-1]
        encoder = self.MAE_encoder
        x, pos = tokens[~mask].view(B, -1, C), encoder.pos_embed(center[~mask].view(B, -1, 3))
        for block in encoder.blocks.blocks:
            x = block(x + pos)
        x = encoder.norm(x)
        pos = torch.cat([self.decoder_pos_embed(center[where]).view(B, -1, C) for where in (~mask, mask)], 1)
        x = torch.cat([x, self.mask_token.expand(B, G - x.shape[1], -1)], 1)
        for block in self.MAE_decoder.blocks:
            x = block(x + pos)
        x = self.MAE_decoder.norm(x[:, -int(mask[0].sum()):])  # (B, M, C)
        predicted = self.increase_dim(x.transpose(1, 2)).transpose(1, 2).reshape(-1, K, 3)  # (B M, K, 3)
        distance = torch.cdist(predicted.to(patches.dtype), patches[mask]).square()
        return distance.min(1)[0].mean() + distance.min(2)[0].mean()

    def _mask(self, B: int, G: int) -> Tensor:
        masks = np.zeros((B, G), bool)
        for row in masks:
            chosen = np.hstack([np.zeros(G - self.num_masked), np.ones(self.num_masked)])
            np.random.shuffle(chosen)
            row[:] = chosen
        return torch.from_numpy(masks)
