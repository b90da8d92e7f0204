"""Inference: the plain model against what is left of EWA and its relatives after ``ewa3d.fuse``."""
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ewa3d.bench.harness import Case, Settings, Work
from ewa3d.bench.step import FULL, QUICK, classifier

__all__ = ['OTHERS', 'RULES', 'SMALL', 'cases', 'flops', 'ordered', 'placed']

# The classifier of configs/relatives.
SMALL = dict(points=1024, num_groups=32, group_size=16, dim=96, depth=6, heads=4, classes=10, widths=(32, 64, 128))
VIT, QUICK_VIT = 'vit_small_patch16_224', dict(img_size=32, embed_dim=12, depth=2, num_heads=2)
BATCHES = (1, 64)


def _experts(kind: str, **options) -> list[dict]:
    return [dict(type=kind, at='blocks.*.mlp', every=2, num_experts=4, **options)]


# After training these are plain models, or at least cheaper ones.
RULES: dict[str, list[dict]] = {
    'plain': [],
    'EWA, fused': _experts('EWAFFN'),
    'adapters, fused': [dict(type='LinearAdapter', at=f'blocks.*.{name}', position=position) for name, position in (
        ('attn.qkv', 'before'), ('attn.proj', 'after'), ('mlp.fc1', 'before'), ('mlp.fc2', 'after'))],
    'ExFusion, fused': _experts('FusionFFN'),
    'RePaViT, idle 0.25, fused': [dict(type='RePaFFN', at='blocks.*', idle_ratio=0.25)],
    'RePaViT, idle 0.5, fused': [dict(type='RePaFFN', at='blocks.*', idle_ratio=0.5)],
}
# These stay what they are, or have another mixer; for the table of configs/relatives.
OTHERS: dict[str, list[dict]] = {
    'mixture of experts': _experts('MoEFFN', top_k=2),
    'RMoE': _experts('ResidualMoEFFN', top_k=2),
    'S4D, fused': [dict(type='S4D', at='blocks.*.attn', d_state=64, bidirectional=True)],
}


def cases(settings: Settings) -> Iterator[Case]:
    """Forward in eval mode at batch 1 and 64, with parameters in training and now, and floating point operations."""
    size, small = (QUICK, QUICK) if settings.quick else (FULL, SMALL)
    for dtype in settings.dtypes:
        for batch in BATCHES[:1] if settings.quick else BATCHES:
            for sizes, rules in ((size, RULES), (small, {**RULES, **OTHERS})):
                yield Case(f'point classifier {sizes["depth"]} × {sizes["dim"]}, {sizes["num_groups"]} groups, batch '
                           f'{batch}, {dtype}', {
                               name: _forward(settings, dtype, _clouds(sizes, batch, name), 'backbone.', chosen)
                               for name, chosen in rules.items()})
            yield Case(f'{VIT}, batch {batch}, {dtype}', {
                name: _forward(settings, dtype, _images(settings.quick, batch), '', chosen)
                for name, chosen in RULES.items()})


def flops(model: nn.Module, inputs) -> int:
    """Floating point operations of matrix products, convolutions and attention in one forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops()


def _clouds(size: dict, batch: int, name: str) -> Callable[[], tuple[nn.Module, object]]:
    return lambda: (classifier(size, **ordered(name)), dict(points=torch.randn(batch, size['points'], 3)))


def ordered(name: str) -> dict[str, str]:
    """The encoder's option of a method: a mixer of sequences visits tokens along a curve."""
    return dict(order='hilbert') if name.startswith('S4D') else {}


def placed(rules: list[dict], prefix: str, length: int | None) -> list[dict]:
    """The rules for a model whose blocks lie at ``prefix``; ``length`` of its sequences is told to who asks for it."""
    return [{**rule, **(dict(length=length) if rule['type'] == 'S4D' else {}), 'at': prefix + rule['at']}
            for rule in rules]


def _images(quick: bool, batch: int) -> Callable[[], tuple[nn.Module, object]]:
    def make():
        import timm
        options = QUICK_VIT if quick else {}
        return timm.create_model(VIT, **options), torch.randn(batch, 3, *[options.get('img_size', 224)] * 2)
    return make


def _forward(settings: Settings, dtype: str, make: Callable[[], tuple[nn.Module, object]], prefix: str,
             rules: list[dict]):
    """A builder (see :class:`Case`) of one forward pass of what ``make`` makes, expanded and fused."""
    def build():
        from ewa3d import expand, fuse
        from ewa3d.reparam import count_params
        model, inputs = make()
        one = {key: value[:1] for key, value in inputs.items()} if isinstance(inputs, dict) else inputs[:1]
        model.eval()
        plain = flops(model, one)
        expand(model, placed(rules, prefix, model.backbone.tokenizer.num_groups + 1 if prefix else None))
        training = count_params(model)
        fuse(model.eval().requires_grad_(False))
        work = flops(model, one)
        model.to(settings.device)
        inputs = {key: value.to(settings.device) for key, value in inputs.items()} if isinstance(inputs, dict) \
            else inputs.to(settings.device)

        def call():
            with torch.inference_mode(), settings.autocast(dtype):
                return model(inputs)
        return Work(call, {'parameters, training': training, 'parameters': count_params(model), 'GFLOPs': work / 1e9,
                           'FLOPs / plain': work / plain})
    return build
