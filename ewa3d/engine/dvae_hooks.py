"""The schedules of Point-BERT's tokenizer."""
from collections.abc import Mapping

from mmengine.hooks import Hook

from ewa3d.checks import check_number
from ewa3d.engine.hooks import optimizer_steps, unwrapped
from ewa3d.engine.schedules import Ramp
from ewa3d.registry import HOOKS

__all__ = ['DVAEScheduleHook']

TEMPERATURE = dict(start=1., target=0.0625, length=100_000, begin=0)
KL_WEIGHT = dict(start=0., target=0.1, length=100_000, begin=10_000)


@HOOKS.register_module()
class DVAEScheduleHook(Hook):
    """Sets ``temperature`` and ``kl_weight`` of a :class:`~ewa3d.models.dvae.DiscreteVAE` before each iteration, as
    functions of the optimizer step.

    The defaults are the published ones, in steps whatever the length of the run: the temperature falls from 1 to
    0.0625 over 100,000; the weight is 0 for 10,000 and rises to 0.1 over 100,000. ``length=0.5`` is half of the run.

    Args:
        score_spread: before the first step, spread the scores so on the first batch, see
            :meth:`~ewa3d.models.dvae.DiscreteVAE.spread_scores`; for short runs.
        temperature, kl_weight: keywords of :class:`~ewa3d.engine.schedules.Ramp`; those left out are the defaults.

    Raises:
        TypeError, ValueError: values out of range; a model without these attributes.
    """

    def __init__(self, temperature: Mapping | None = None, kl_weight: Mapping | None = None,
                 score_spread: float | None = None):
        if score_spread is not None:
            check_number('DVAEScheduleHook: score_spread', score_spread, '(0, inf)')
        self.score_spread = score_spread
        self.ramps = dict(temperature=Ramp(**{**TEMPERATURE, **(temperature or {})}),
                          kl_weight=Ramp(**{**KL_WEIGHT, **(kl_weight or {})}))
        coldest = min(self.ramps['temperature'].start, self.ramps['temperature'].target)
        if coldest <= 0:
            raise ValueError(f'DVAEScheduleHook: the temperature must stay above 0, got {coldest}')

    def before_train(self, runner) -> None:
        model = unwrapped(runner.model)
        if not all(hasattr(model, name) for name in self.ramps):
            raise TypeError(f'DVAEScheduleHook sets {" and ".join(self.ramps)} of a DiscreteVAE, and '
                            f'{type(model).__name__} has none')

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        step, total = optimizer_steps(runner)
        for name, ramp in self.ramps.items():
            setattr(unwrapped(runner.model), name, ramp(step, total))
        if self.score_spread is not None and runner.iter == 0:
            model = unwrapped(runner.model)
            model.spread_scores(model.data_preprocessor(data_batch, True)['inputs'], self.score_spread)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        for name in self.ramps:
            runner.message_hub.update_scalar(f'train/{name}', getattr(unwrapped(runner.model), name))
