"""Whole training steps of a Point-MAE-size classifier: what EWA costs on top of the plain model, and what the form in
which the model is usually written costs."""
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ewa3d.bench.harness import Case, Settings
from ewa3d.bench.published import NaiveClassifier, scale_and_translate

__all__ = ['cases', 'classifier', 'ewa_rules', 'training_step']

FULL = dict(batch=32, points=1024, num_groups=64, group_size=32, dim=384, depth=12, heads=6, classes=40,
            widths=(128, 256, 512))
QUICK = dict(batch=4, points=64, num_groups=8, group_size=8, dim=16, depth=2, heads=2, classes=5, widths=(8, 16, 16))
DROP_PATH = 0.1


def cases(settings: Settings) -> Iterator[Case]:
    """Plain, 4 experts in every second FFN, 4 experts in every FFN; averaging after each optimizer step included. And
    as published, in low precision also beside the published form in fp32. On a GPU, compiled as well."""
    size = QUICK if settings.quick else FULL
    for dtype in settings.dtypes:
        name = (f'train step {size["depth"]} × {size["dim"]}, {size["num_groups"]} groups × {size["group_size"]}, '
                f'batch {size["batch"]}, {dtype}')
        variants = {'plain': _step(settings, size, dtype), 'EWA, every 2nd FFN': _step(settings, size, dtype, every=2),
                    'EWA, every FFN': _step(settings, size, dtype, every=1),
                    'as published': _published(settings, size, dtype)}
        if dtype != 'fp32':
            variants['as published, fp32'] = _published(settings, size, 'fp32')
        compiled = {'plain, compiled': _step(settings, size, dtype, wrap=_compiled),
                    'EWA, every 2nd FFN, compiled': _step(settings, size, dtype, every=2, wrap=_compiled)}
        on_gpu = settings.device.type == 'cuda'
        yield Case(name, {**variants, **compiled} if on_gpu else variants, skipped={} if on_gpu else dict.fromkeys(
            compiled, 'measured with --device cuda'))


def _step(settings: Settings, size: dict, dtype: str, every: int = 0, wrap=lambda model: model):
    """A builder of :func:`training_step`."""
    return lambda: training_step(settings, size, dtype, ewa_rules(every), wrap=wrap)


def _compiled(model: nn.Module) -> nn.Module:
    """As ``compile = True`` of a config has it: from the clouds to the head's input."""
    model.extract = torch.compile(model.extract)
    return model


def ewa_rules(every: int) -> list[dict]:
    """Four experts in every so many FFNs; none for 0."""
    return [dict(type='EWAFFN', at='backbone.blocks.*.mlp', every=every, num_experts=4)] if every else []


def training_step(settings: Settings, size: dict, dtype: str, rules: Sequence[dict] = (), average: bool | None = None,
                  wrap=lambda model: model, **backbone):
    """One step of the model with ``rules``: forward, losses, backward, AdamW, and the averaging of the experts where
    there is an ``EWAFFN`` among them (or as ``average`` says); ``wrap`` may put the model into another one."""
    from ewa3d import attach_ewa, expand
    from ewa3d.structures import Sample
    model = classifier(size, **backbone).to(settings.device)
    expand(model, list(rules))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    if average or (average is None and any(rule['type'] == 'EWAFFN' for rule in rules)):
        attach_ewa(optimizer, model, share_rate=0.3, schedule='constant', total_steps=1_000_000)
    model = wrap(model)
    points = torch.randn(size['batch'], size['points'], 3, device=settings.device)
    samples = [Sample(gt_label=torch.tensor(i % size['classes'], device=settings.device))
               for i in range(size['batch'])]

    def step():
        with settings.autocast(dtype):
            losses = model(dict(points=points), samples, mode='loss')
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def _published(settings: Settings, size: dict, dtype: str):
    """A builder of the step of the published training loop: the clouds augmented one by one (which our data loader does
    beside the step), forward, loss, backward, AdamW as it comes, loss and accuracy fetched from the device."""
    def build():
        model = NaiveClassifier(classifier(size), size, DROP_PATH).to(settings.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
        points = torch.randn(size['batch'], size['points'], 3, device=settings.device)
        labels = torch.arange(size['batch'], device=settings.device) % size['classes']

        def step():
            clouds = scale_and_translate(points.clone())
            with settings.autocast(dtype):
                logits = model(clouds)
                loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            model.zero_grad()
            return loss.item(), (logits.argmax(-1) == labels).float().mean().item()
        return step
    return build


def classifier(size: dict, drop_path: float = DROP_PATH, dropout: float = 0.5, **backbone) -> nn.Module:
    """Our model of these sizes; other keywords go to its ``TokenEncoder``."""
    from ewa3d.registry import MODELS
    tokenizer = dict(type='PointPatchEmbed', num_groups=size['num_groups'], group_size=size['group_size'],
                     embed_dim=size['dim'], widths=size['widths'])
    backbone = dict(type='TokenEncoder', tokenizer=tokenizer, embed_dim=size['dim'], depth=size['depth'],
                    num_heads=size['heads'], drop_path_rate=drop_path, **backbone)
    return MODELS.build(dict(type='TaskModel', backbone=backbone, neck=dict(type='TokenPool'),
                             head=dict(type='ClsHead', num_classes=size['classes'], form='mlp', dropout=dropout)))
