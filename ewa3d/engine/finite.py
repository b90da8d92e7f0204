"""Numbers going wrong: a step whose loss or gradients are NaN or infinite is an error, or is left out and counted."""
import math
from collections.abc import Iterator, Mapping

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from torch import Tensor, nn

from ewa3d.checks import check_integer, some
from ewa3d.engine.hooks import get_rng_state, set_rng_state, unwrapped
from ewa3d.registry import HOOKS, nearest

__all__ = ['FiniteHook', 'find_offender', 'is_finite']

ACTIONS = ('raise', 'skip')


@HOOKS.register_module()
class FiniteHook(Hook):
    """Looks at the loss and the gradients of every optimizer step, before it is taken; one number a step is waited for.

    A step that is left out changes nothing: no parameter, no moment of the optimizer, no buffer (statistics of a
    BatchNorm), and experts are not averaged after it. The schedules go on. All ranks decide alike. ``skipped_steps`` in
    ``metrics.jsonl`` and in the log counts them; their losses are in no mean. Gradients that overflow in float16 belong
    to the gradient scaler and are left to it.

    Args:
        action: ``'raise'`` or ``'skip'``.
        limit: with ``'skip'``, so many steps in a row are left out; the next one is an error.

    Raises:
        FloatingPointError: naming the step, the samples of the batch and the first module with such numbers.
    """
    priority = 'HIGHEST'  # before the losses are logged

    def __init__(self, action: str = 'raise', limit: int = 10):
        if action not in ACTIONS:
            raise ValueError(f'FiniteHook: no action {action!r}; {nearest(action, ACTIONS)}')
        self.action, self.limit = action, check_integer('FiniteHook: limit', limit, 1)
        self._clear()

    def _clear(self) -> None:
        """Forget the iterations of a step: ``(batch, random state)`` of each, their losses, the buffers before it."""
        self._batches: list[tuple] = []
        self._losses: list[Tensor] = []
        self._buffers: dict[str, Tensor] = {}

    def before_train(self, runner) -> None:
        self._clear()
        self.runner = runner
        if hasattr(runner.optim_wrapper, 'guard'):
            runner.optim_wrapper.guard = self
        else:
            runner.logger.info(f'{type(runner.optim_wrapper).__name__} does not ask FiniteHook: steps are not checked')

    def after_train(self, runner) -> None:
        if hasattr(runner.optim_wrapper, 'guard'):
            runner.optim_wrapper.guard = None
        self._clear()

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        if getattr(runner.optim_wrapper, 'guard', None) is not self:
            return
        if not self._batches and self.action == 'skip':
            self._buffers = {k: v.clone() for k, v in unwrapped(runner.model).named_buffers()}
        self._batches.append((data_batch, get_rng_state()))

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        hub = runner.message_hub
        if self.action == 'skip' and isinstance(outputs, dict):
            for key in [key for key, value in outputs.items() if not is_finite(value)]:
                del outputs[key]
        if hub.get_info('skipped_steps'):
            hub.update_scalar('train/skipped_steps', hub.get_info('skipped_steps'))

    # ---- what the optimizer wrapper calls ----------------------------------------------------------------------------
    def see(self, loss: Tensor) -> None:
        """Take down the loss of an iteration."""
        self._losses.append(loss.detach())

    def allows(self, gradients: list[Tensor]) -> bool:
        """Whether the step may be taken; ``gradients`` are those to look at."""
        hub = self.runner.message_hub
        row = 0 if self._are_finite(gradients) else 1 + (hub.get_info('skipped_in_row') or 0)
        if row:
            self._report(row)
            hub.update_info('skipped_steps', 1 + (hub.get_info('skipped_steps') or 0))
        if row or hub.get_info('skipped_in_row'):
            hub.update_info('skipped_in_row', row)
        self._clear()
        return not row

    def _are_finite(self, gradients: list[Tensor]) -> bool:
        flags = [loss.isfinite().all() for loss in self._losses]
        parts = [g.to_local() if hasattr(g, 'to_local') else g for g in gradients]  # of shards, this rank's
        parts = [part for part in parts if part.numel()]
        if parts:
            flags.append(_finite(parts, 2.) or _finite(parts, math.inf))  # squares may leave the range
        finite = torch.stack([flag.to(flags[0].device) for flag in flags]).all().int()
        all_reduce(finite, 'min')  # a loss may be NaN on one rank only
        return bool(finite)

    def _report(self, row: int) -> None:
        """Raise, or warn and put the buffers back."""
        text = self._describe()
        if self.action == 'raise':
            raise FloatingPointError(f"{text} (default_hooks.finite.action='skip' leaves such steps out)")
        if row > self.limit:
            raise FloatingPointError(f'{text}; {self.limit} steps in a row were left out before it, which is the limit')
        buffers = dict(unwrapped(self.runner.model).named_buffers())
        for name, value in self._buffers.items():
            buffers[name].copy_(value)
        self.runner.logger.warning(f'{text}: the step is left out, {row} in a row')

    def _describe(self) -> str:
        model, wrapper = unwrapped(self.runner.model), self.runner.optim_wrapper
        gradients = {name for name, p in model.named_parameters() if p.grad is not None and not is_finite(p.grad)}
        bad = next((i for i, loss in enumerate(self._losses) if not is_finite(loss)), None)
        what = 'the gradients are not finite' if bad is None else f'the loss is {float(self._losses[bad])}'
        batch, state = self._batches[-1 if bad is None else bad]
        kept = get_rng_state(), {k: v.clone() for k, v in model.named_buffers()}
        set_rng_state(state)
        with wrapper.optim_context(model), torch.no_grad():
            found = find_offender(model, batch, gradients if bad is None else ())
        set_rng_state(kept[0])
        for name, value in model.named_buffers():
            value.copy_(kept[1][name])
        return (f'iteration {self.runner.iter + 1}, epoch {self.runner.epoch + 1}: {what}; {found}; '
                f'samples of the batch: {some(sample_names(batch), 32)}')


def _finite(gradients: list[Tensor], order: float) -> Tensor:
    """Whether their norm is finite; that of order 2 is many times as fast as the largest number on a CPU."""
    return torch.nn.utils.get_total_norm(gradients, order).isfinite()


def is_finite(value) -> bool:
    """Whether all numbers in a tensor, a number or a tree of them are finite; what is no number is."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(value.isfinite().all())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    return all(map(is_finite, value)) if isinstance(value, (list, tuple)) else True


def find_offender(model: nn.Module, batch, bad_gradients=()) -> str:
    """Where the numbers go wrong, in words: the first such parameter, or module in the order of a forward of ``batch``.

    Args:
        model: with ``data_preprocessor`` and ``forward(..., mode='loss')``, as mmengine's.
        bad_gradients: names of parameters with such gradients; the backward meets the last of them first.
    """
    weights = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if weights:
        return f'parameters that are not finite before the step: {some(weights, 3)}'
    order, first = _forward(model, batch)
    if first:
        return f'the first module with such an output is {first}'
    owners = [name for name in order if any(g.rpartition('.')[0] == name for g in bad_gradients)]
    if bad_gradients:
        last = owners[-1] if owners else sorted(bad_gradients)[0].rpartition('.')[0]
        return f'the first module that the backward gives such gradients is {last or type(model).__name__!r}'
    return 'all modules have finite outputs in a second forward: it is the loss itself'


def _forward(model: nn.Module, batch) -> tuple[list[str], str]:
    """The names of the modules in the order in which they end, and the first of them with an output not finite."""
    order, first = [], []

    def hook(name: str):
        def look(module, args, output) -> None:
            order.append(name)
            if name and not first and not is_finite(output):
                first.append(f'{name!r} ({type(module).__name__})')
        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        model._run_forward(model.data_preprocessor(batch, True), mode='loss')
    finally:
        for handle in handles:
            handle.remove()
    return order, first[0] if first else ''


def sample_names(batch) -> Iterator[str]:
    """``name (index)`` of every sample in a batch that was not moved yet."""
    samples = batch.get('data_samples') if isinstance(batch, Mapping) else None
    for i, sample in enumerate(samples or ()):
        name, index = (sample.get(key) if hasattr(sample, 'get') else None for key in ('name', 'index'))
        known = [str(v) for v in (name, None if index is None else f'index {index}') if v is not None]
        yield ' '.join(known) or f'the {i}-th'
