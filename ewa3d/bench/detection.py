"""3DETR at full size: the forward pass of one scene, its parts, and the peak of its memory."""
from collections.abc import Iterator

import torch

from ewa3d.bench.harness import Case, Settings

__all__ = ['cases', 'detector']

POINTS = (20_000, 40_000)
QUICK_POINTS = (200,)
FULL = dict(num_points=2048, num_neighbors=64, widths=(64, 128, 256), dim=256, depth=3, queries=256, layers=8, heads=4)
QUICK = dict(num_points=24, num_neighbors=8, widths=(8, 16), dim=16, depth=2, queries=8, layers=2, heads=2)


def cases(settings: Settings) -> Iterator[Case]:
    """The plain and the masked model, and where the time goes, by the number of points; in each dtype."""
    size, masked = (QUICK if settings.quick else FULL), (False, True)
    for dtype in settings.dtypes:
        for points in QUICK_POINTS if settings.quick else POINTS:
            yield Case(f'forward 1×{points}, {dtype}', {
                '3DETR-m' if m else '3DETR': _part('whole', points, size, m, dtype, settings) for m in masked},
                memory=True)
            yield Case(f'parts of 3DETR 1×{points}, {dtype}', {
                part: _part(part, points, size, False, dtype, settings) for part in
                ('whole', 'sampling and balls', 'tokenizer', 'encoder', 'decoder and head')}, memory=True)


def detector(size: dict, masked: bool = False, num_classes: int = 18, num_angle_bins: int = 1):
    """3DETR, or 3DETR-m, of a size like ``FULL``."""
    from ewa3d.registry import MODELS
    tokenizer = dict(type='SetAbstraction', **{key: size[key] for key in ('num_points', 'num_neighbors', 'widths')})
    thinner = dict(type='SetAbstraction', num_points=size['num_points'] // 2, radius=0.4,
                   num_neighbors=size['num_neighbors'] // 2, widths=(size['dim'],) * 3)
    backbone = dict(type='SetEncoder', tokenizer=tokenizer, embed_dim=size['dim'], depth=size['depth'],
                    num_heads=size['heads'], downsample=thinner if masked else None,
                    mask_radius=(0.4, 0.8, 1.2)[:size['depth']] if masked else None)
    neck = dict(type='QueryDecoder', num_queries=size['queries'], depth=size['layers'], num_heads=size['heads'],
                project_depth=2 if masked else 3)
    head = dict(type='DETRHead', num_classes=num_classes, num_angle_bins=num_angle_bins)
    return MODELS.build(dict(type='TaskModel', backbone=backbone, neck=neck, head=head))


def room(points: int, settings: Settings) -> torch.Tensor:
    """Points on the floor and the walls of a room of 7 × 5 × 2.5 m, which balls find as many of as in a scan."""
    generator = torch.Generator().manual_seed(settings.seed)
    places = torch.rand(1, points, 3, generator=generator) * torch.tensor([7., 5., 2.5])
    side = torch.randint(3, (1, points, 1), generator=generator)  # which coordinate is 0: two walls, the floor
    return places.masked_fill(torch.arange(3) == side, 0.).to(settings.device)


def _part(part: str, points: int, size: dict, masked: bool, dtype: str, settings: Settings):
    """A builder (see :class:`Case`) of a part of the forward pass in eval mode, given what comes before it."""
    def build():
        model, cloud = detector(size, masked).to(settings.device).eval(), room(points, settings)
        backbone, neck = model.backbone, model.neck
        tokens = backbone.tokenizer(cloud) if part == 'encoder' else None
        located = backbone.located(cloud) if part == 'decoder and head' else None
        work = {'whole': lambda: model(cloud), 'sampling and balls': lambda: backbone.tokenizer.group(cloud),
                'tokenizer': lambda: backbone.tokenizer(cloud),
                'encoder': lambda: backbone.encode(tokens.x, tokens.coord),
                'decoder and head': lambda: model.head(neck(*located, cloud))}[part]

        def call():
            with torch.no_grad(), settings.autocast(dtype):
                return work()
        return call
    return build
