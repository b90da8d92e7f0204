"""Training steps of timm's ViT-S in a plain PyTorch loop: what EWA costs on top."""
from collections.abc import Iterator

import torch

from ewa3d.bench.harness import Case, Settings

__all__ = ['cases']

FULL = dict(name='vit_small_patch16_224', batch=16, classes=1000, size=224)
QUICK = dict(name='vit_tiny_patch16_224', batch=2, classes=5, size=32)


def cases(settings: Settings) -> Iterator[Case]:
    """Plain, 4 experts in every second FFN, 4 experts in every FFN; averaging after each optimizer step included."""
    size = QUICK if settings.quick else FULL
    for dtype in settings.dtypes:
        yield Case(f'train step {size["name"]}, {size["size"]} px, batch {size["batch"]}, {dtype}', {
            'plain': _step(settings, size, dtype), 'EWA, every 2nd FFN': _step(settings, size, dtype, every=2),
            'EWA, every FFN': _step(settings, size, dtype, every=1)})


def _step(settings: Settings, size: dict, dtype: str, every: int = 0):
    """A builder (see :class:`Case`) of one step: forward, loss, backward, AdamW, with ``every`` the averaging."""
    def build():
        import timm

        from ewa3d import attach_ewa, expand, param_groups
        tiny = dict(img_size=32, embed_dim=12, depth=2, num_heads=2) if settings.quick else {}
        model = timm.create_model(size['name'], num_classes=size['classes'], **tiny).to(settings.device)
        if every:
            expand(model, [dict(type='EWAFFN', at='blocks.*.mlp', every=every, num_experts=4)])
        model.train()
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-4, weight_decay=0.05), fused=True)
        if every:
            attach_ewa(optimizer, model, share_rate=0.3, schedule='constant', total_steps=1_000_000)
        images = torch.randn(size['batch'], 3, size['size'], size['size'], device=settings.device)
        labels = torch.arange(size['batch'], device=settings.device) % size['classes']

        def step():
            with settings.autocast(dtype):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return step
    return build
