"""Mixed precision on any device, and the learning-rate schedule that follows the length of the run."""
import math
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper as _OptimWrapper
from mmengine.optim.scheduler import _ParamScheduler
from torch import Tensor, nn

from ewa3d.registry import OPTIM_WRAPPERS, PARAM_SCHEDULERS

__all__ = ['AutocastOptimWrapper', 'OptimWrapper', 'WarmupCosineLR']

INF = int(1e9)


@OPTIM_WRAPPERS.register_module()
class OptimWrapper(_OptimWrapper):
    """mmengine's, which asks before a step whether it may be taken.

    Attributes:
        guard: ``None``, or what is asked, :class:`ewa3d.engine.finite.FiniteHook`.
    """
    guard = None

    def update_params(self, loss: Tensor, step_kwargs: dict | None = None, zero_kwargs: dict | None = None) -> None:
        if self.guard is not None:
            self.guard.see(loss)
        super().update_params(loss, step_kwargs, zero_kwargs)

    def step(self, **kwargs) -> None:
        if self.guard is None or self.guard.allows(self._gradients()):
            self._step(**kwargs)

    def _step(self, **kwargs) -> None:
        super().step(**kwargs)

    def _gradients(self) -> list[Tensor]:
        """The gradients that have to be finite."""
        return [p.grad for group in self.optimizer.param_groups for p in group['params'] if p.grad is not None]


@OPTIM_WRAPPERS.register_module()
class AutocastOptimWrapper(OptimWrapper):
    """``torch.autocast`` around the training forward, on the CPU and on GPUs; accumulation and clipping as mmengine's.

    Evaluation stays in fp32. mmengine's ``AmpOptimWrapper`` insists on a GPU.

    Args:
        optimizer: the optimizer to wrap.
        dtype: ``'bfloat16'``, or ``'float16'`` with a gradient scaler (CUDA only).
        **kwargs: ``accumulative_counts``, ``clip_grad`` of ``OptimWrapper``.

    Raises:
        ValueError: another ``dtype``, or float16 without a CUDA device.
    """

    def __init__(self, optimizer, dtype: str = 'bfloat16', **kwargs):
        super().__init__(optimizer=optimizer, **kwargs)
        if dtype not in ('bfloat16', 'float16'):
            raise ValueError(f"AutocastOptimWrapper: dtype must be 'bfloat16' or 'float16', got {dtype!r}")
        on_cuda = all(p.is_cuda for group in optimizer.param_groups for p in group['params'])
        if dtype == 'float16' and not on_cuda:
            raise ValueError("AutocastOptimWrapper: dtype='float16' needs its gradient scaler and a CUDA device; "
                             "use dtype='bfloat16' here")
        self.dtype = getattr(torch, dtype)
        self.scaler = torch.amp.GradScaler('cuda', enabled=dtype == 'float16')

    @contextmanager
    def optim_context(self, model: nn.Module):
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=self.dtype):
            yield

    def backward(self, loss: Tensor, **kwargs) -> None:
        self.scaler.scale(loss).backward(**kwargs)
        self._inner_count += 1

    def _step(self, **kwargs) -> None:
        if self.clip_grad_kwargs:
            self.scaler.unscale_(self.optimizer)
            self._clip_grad()
        self.scaler.step(self.optimizer, **kwargs)
        self.scaler.update()

    def _gradients(self) -> list[Tensor]:
        return [] if self.scaler.is_enabled() else super()._gradients()  # overflow is the scaler's to see

    def state_dict(self) -> dict:
        state = super().state_dict()
        if self.scaler.is_enabled():
            state['loss_scaler'] = self.scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        state_dict = dict(state_dict)
        scaler = state_dict.pop('loss_scaler', None)
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        super().load_state_dict(state_dict)


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """Linear warm-up, then half a cosine: a pure function of the iteration, stretched over the whole run.

    The factor at iteration ``t`` of ``T`` multiplies every group's own learning rate, so groups keep their ratios:
    ``warmup_factor + (1 - warmup_factor) * t / W`` for ``t < W = round(warmup * T)``, then
    ``r + (1 - r) * (1 + cos(pi * (t - W) / (T - W))) / 2`` with ``r`` the ratio of the smallest to the base rate.
    ``T`` is the run's number of iterations: changing ``train_cfg.max_epochs`` alone rescales everything.

    Args:
        last_step, by_epoch, verbose: mmengine's, which builds schedulers with them; to be left as they are.
        optimizer: the optimizer (wrapper).
        warmup: share of the run, in ``[0, 1)``: ten of 300 epochs are ``1/30``.
        warmup_factor: where the warm-up starts, relative to the base rate.
        eta_min: the smallest rate of a group with the optimizer's own ``lr``; others end in proportion.
        eta_min_ratio: the same as a ratio; only one of the two.
        begin, end: iterations; the Runner fills ``end``.

    Raises:
        ValueError: a fraction out of its range, or both minima.
    """
    by_iteration = True  # tells the Runner to count iterations whatever `by_epoch` defaults to

    def __init__(self, optimizer, warmup: float = 0.0, warmup_factor: float = 1e-3, eta_min: float | None = None,
                 eta_min_ratio: float | None = None, begin: int = 0, end: int = INF, last_step: int = -1,
                 by_epoch: bool = False, verbose: bool = False):
        if not 0 <= warmup < 1:
            raise ValueError(f'WarmupCosineLR: warmup is a share of the run in [0, 1) (10 of 300 epochs: 1/30), '
                             f'got {warmup}')
        if not 0 <= warmup_factor <= 1:
            raise ValueError(f'WarmupCosineLR: warmup_factor must be in [0, 1], got {warmup_factor}')
        if eta_min is not None and eta_min_ratio is not None:
            raise ValueError(f'WarmupCosineLR: give eta_min ({eta_min}) or eta_min_ratio ({eta_min_ratio}), not both')
        if by_epoch:
            raise ValueError('WarmupCosineLR counts iterations: by_epoch=True is not possible')
        if eta_min is not None:
            eta_min_ratio = eta_min / _base_lr(optimizer)
        self.ratio = float(eta_min_ratio or 0.0)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f'WarmupCosineLR: the smallest rate is {self.ratio:g} of the base rate, not in [0, 1]')
        self.warmup, self.warmup_factor = warmup, warmup_factor
        super().__init__(optimizer, 'lr', begin=begin, end=end, last_step=last_step, by_epoch=False, verbose=verbose)

    def factor(self, step: int) -> float:
        """The multiplier of every base rate at iteration ``step`` (counted from ``begin``)."""
        total = self.end - self.begin
        warm = round(self.warmup * total)
        if step < warm:
            return self.warmup_factor + (1 - self.warmup_factor) * step / warm
        progress = min((step - warm) / max(total - warm, 1), 1.0)
        return self.ratio + (1 - self.ratio) * (1 + math.cos(math.pi * progress)) / 2

    def step(self) -> None:
        # mmengine warns when this comes before the first optimizer step; with gradient accumulation that is right.
        self.optimizer._global_step = max(self.optimizer._global_step, 0)
        super().step()

    def _get_value(self) -> list[float]:
        factor = self.factor(self.last_step)
        return [base * factor for base in self.base_values]

    def state_dict(self) -> dict:
        """Where the schedule stands; its shape comes from the config, so that ``max_epochs`` may change on resume."""
        return dict(last_step=self.last_step, _global_step=self._global_step)

    def load_state_dict(self, state_dict: dict) -> None:
        self.last_step, self._global_step = int(state_dict['last_step']), int(state_dict['_global_step'])
        for group, value in zip(self.optimizer.param_groups, self._get_value()):
            group['lr'] = value
        self._last_value = [group['lr'] for group in self.optimizer.param_groups]


def _base_lr(optimizer) -> float:
    optimizer = getattr(optimizer, 'optimizer', optimizer)
    lr = float(optimizer.defaults['lr'])
    if lr <= 0:
        raise ValueError(f'WarmupCosineLR: eta_min needs a positive learning rate of the optimizer, got {lr}')
    return lr
