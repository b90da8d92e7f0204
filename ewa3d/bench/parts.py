"""Part segmentation: interpolation against gathering, and what carrying features to the points takes of a step."""
from collections.abc import Iterator

import torch
from torch import Tensor

from ewa3d.bench.harness import DTYPES, Case, Settings

__all__ = ['cases']

INTERPOLATION = ((16, 2048, 64, 192), (32, 2048, 128, 384))  # batch, points, tokens, channels
FULL = dict(batch=16, points=2048, num_groups=64, group_size=16, dim=96, depth=6, heads=4, categories=16, parts=50)
QUICK_INTERPOLATION = ((2, 12, 4, 3),)
QUICK = dict(batch=2, points=40, num_groups=8, group_size=6, dim=16, depth=3, heads=2, categories=3, parts=5)


def cases(settings: Settings) -> Iterator[Case]:
    """Interpolation, forward and backward; a whole model, and its backbone, neck and head by themselves."""
    from ewa3d.ops import interpolate
    size = QUICK if settings.quick else FULL
    for dtype in settings.dtypes:
        for shape in QUICK_INTERPOLATION if settings.quick else INTERPOLATION:
            batch, points, tokens, channels = shape
            yield Case(f'interpolation {batch}×{points} from {tokens}, {channels} channels, {dtype}', {
                'gather': _interpolated(interpolate_gather, shape, dtype, settings),
                'ewa3d': _interpolated(interpolate, shape, dtype, settings)}, memory=True)
        yield Case(f'part segmentation {size["batch"]}×{size["points"]}, {size["depth"]} × {size["dim"]}, {dtype}', {
            part: _trained(part, size, dtype, settings) for part in ('whole', 'backbone', 'neck', 'head')}, memory=True)


def interpolate_gather(query: Tensor, points: Tensor, features: Tensor, k: int = 3) -> Tensor:
    """Inverse-distance interpolation the way it is usually written: every point's neighbours are gathered.

    Shape:
        - query ``(B, N, 3)``, points ``(B, S, 3)``, features ``(B, S, C)``; returns ``(B, N, C)``.
    """
    distance = (query.unsqueeze(2) - points.unsqueeze(1)).square().sum(-1)
    distance, index = distance.topk(k, dim=-1, largest=False)
    weight = 1 / (distance + 1e-8)
    weight = (weight / weight.sum(-1, keepdim=True)).to(features.dtype)
    rows = torch.arange(len(features), device=features.device).view(-1, 1, 1)
    return (features[rows, index] * weight.unsqueeze(-1)).sum(2)


def _interpolated(function, shape: tuple[int, ...], dtype: str, settings: Settings):
    """A builder (see :class:`Case`) of ``function`` forward and backward."""
    def build():
        batch, points, tokens, channels = shape
        cloud = torch.randn(batch, points, 3, device=settings.device)
        features = torch.randn(batch, tokens, channels, device=settings.device, dtype=DTYPES[dtype]).requires_grad_()
        gradient = torch.randn(batch, points, channels, device=settings.device, dtype=DTYPES[dtype])
        centres = cloud[:, :tokens].contiguous()
        return lambda: torch.autograd.grad(function(cloud, centres, features), features, gradient)
    return build


def _trained(part: str, size: dict, dtype: str, settings: Settings):
    """A builder of forward and backward of a part of the model; the others are not run."""
    def build():
        model, inputs, samples = _model(size, settings)
        neck, head = model.neck, model.head
        with torch.no_grad(), settings.autocast(dtype):
            coord = model.backbone.tokenize(inputs).coord
            features = [x.requires_grad_() for x in _encoded(model, inputs)]
            carried = neck(features, coord, inputs)
        carried = carried._replace(x=carried.x.requires_grad_(), shared=carried.shared.requires_grad_())
        losses = dict(whole=lambda: model(inputs, samples, mode='loss')['loss_seg'],
                      backbone=lambda: _sum_of_squares(_encoded(model, inputs)),
                      neck=lambda: _sum_of_squares(neck(features, coord, inputs)[:2]),
                      head=lambda: head.loss(carried, samples)['loss_seg'])

        def step():
            with settings.autocast(dtype):
                loss = losses[part]()
            loss.backward()
            model.zero_grad()
        return step
    return build


def _encoded(model, inputs: dict) -> tuple[Tensor, ...]:
    tokens = model.backbone.tokenize(inputs)
    return model.backbone.encode(tokens.x, tokens.pos, model.neck.out_indices)


def _sum_of_squares(tensors) -> Tensor:
    return sum(x.square().sum(dtype=torch.float32) for x in tensors)


def _model(size: dict, settings: Settings):
    """The model of ``configs/_base_/models/point-mae_xs_partseg.py`` in this size, a batch and its labels."""
    from ewa3d.registry import MODELS
    from ewa3d.structures import Sample
    tokenizer = dict(type='PointPatchEmbed', num_groups=size['num_groups'], group_size=size['group_size'],
                     widths=(32, 64, 128))
    backbone = dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=size['dim'], depth=size['depth'],
                    num_heads=size['heads'], cls_token=False)
    third = size['depth'] // 3
    neck = dict(type='PointFeaturePropagation', out_indices=(third - 1, 2 * third - 1, 3 * third - 1),
                hidden=2 * size['dim'], out_dim=size['dim'], category_dim=16, num_categories=size['categories'])
    head = dict(type='PartSegHead', num_parts=size['parts'], hidden=(size['dim'], 64), dropout=0.)
    model = MODELS.build(dict(type='TaskModel', backbone=backbone, neck=neck, head=head)).to(settings.device).train()
    inputs = dict(points=torch.randn(size['batch'], size['points'], 3, device=settings.device),
                  category=torch.arange(size['batch'], device=settings.device) % size['categories'])
    samples = [Sample(gt_parts=torch.randint(size['parts'], (size['points'],), device=settings.device))
               for _ in range(size['batch'])]
    return model, inputs, samples
