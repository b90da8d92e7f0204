"""Training steps of the classifier of ``configs/relatives`` with each method that it lists."""
from collections.abc import Iterator

from ewa3d.bench.harness import Case, Settings
from ewa3d.bench.latency import OTHERS, RULES, SMALL, ordered, placed
from ewa3d.bench.step import QUICK, training_step

__all__ = ['cases']


def cases(settings: Settings) -> Iterator[Case]:
    """Plain and each relative; the experts are averaged where the name says EWA. Losses of routers included."""
    size = QUICK if settings.quick else dict(SMALL, batch=32)
    mixture, repa = OTHERS['mixture of experts'], RULES['RePaViT, idle 0.5, fused']
    methods = {name.removesuffix(', fused'): rules for name, rules in {**RULES, **OTHERS}.items()}
    methods |= {'mixture of experts, EWA': mixture, 'RePaViT, idle 0.5, EWA': [*repa, *RULES['EWA, fused']]}
    for dtype in settings.dtypes:
        yield Case(f'train step {size["depth"]} × {size["dim"]}, {size["num_groups"]} groups, batch {size["batch"]}, '
                   f'{dtype}', {name: _step(settings, size, dtype, name, rules) for name, rules in methods.items()})


def _step(settings: Settings, size: dict, dtype: str, name: str, rules: list[dict]):
    return lambda: training_step(settings, size, dtype, placed(rules, 'backbone.', size['num_groups'] + 1),
                                 average='EWA' in name, **ordered(name))
