"""The EWA update: after each optimizer step the experts move towards their mean (arXiv 2308.06093; closed form below).

With share rate β, W_i ← (1 − β)·W_i + β/(E−1)·Σ_{j≠i} W_j. With the mean W̄ and c = 1 − β·E/(E−1) this is
W_i ← W̄ + c·(W_i − W̄), for all experts at once: one ``lerp_`` towards the mean, which itself never moves.
"""
import logging
import weakref
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ewa3d.checks import check_integer, is_number
from ewa3d.engine.schedules import ShareRate
from ewa3d.layers.stacked import Experts, iter_experts

__all__ = ['ExpertAveraging', 'attach_ewa', 'average_', 'expert_spread', 'largest_share_rate', 'whole']

logger = logging.getLogger('ewa3d')
_attached: 'weakref.WeakKeyDictionary[Optimizer, list]' = weakref.WeakKeyDictionary()


def largest_share_rate(num_experts: int) -> float:
    """β at which all experts become their mean, (E − 1)/E; more would over-shoot it."""
    return (num_experts - 1) / num_experts


@torch.no_grad()
def average_(experts: Tensor | nn.Module | Iterable, share_rate: float) -> None:
    """One EWA update, in place.

    Parameters that ``fully_shard`` split are averaged right along whichever dimension: where it is the experts', every
    rank has to call this, and their sums travel; along another one nothing does.

    Args:
        experts: a tensor with a leading expert dimension, a module (all stacked experts in it), or several of them.
        share_rate: β, the share that an expert takes over from the others, in ``[0, (E - 1) / E]``.

    Raises:
        ValueError: β is out of range for a tensor's number of experts. All are checked before any is changed.
    """
    tensors = list(_tensors(experts))
    for tensor in tensors:
        check_share_rate(share_rate, len(tensor))
    for tensor in tensors:
        _average(tensor, share_rate)


def check_share_rate(share_rate: float, num_experts: int) -> None:
    """Raise where ``share_rate`` is not a number in ``[0, (E - 1) / E]``."""
    if not is_number(share_rate):
        raise TypeError(f'share_rate must be a number, got {share_rate!r}')
    if num_experts < 2:
        raise ValueError(f'averaging needs at least 2 experts in the leading dimension, got {num_experts}')
    limit = largest_share_rate(num_experts)
    if not 0 <= share_rate <= limit + 1e-12:  # room for the rounding of (E - 1) / E
        raise ValueError(f'share rate {float(share_rate)!r} is outside [0, (E - 1) / E] = [0, {limit:.6g}] for '
                         f'{num_experts} experts; more than full averaging over-shoots the mean')


def _average(stacked: Tensor, share_rate: float) -> None:
    weight = min(float(share_rate) / largest_share_rate(len(stacked)), 1.)  # 1 - c
    if weight == 0:
        return
    local, groups = _local(stacked)
    wide = local.float() if local.dtype in (torch.float16, torch.bfloat16) else local
    mean = _sum(wide)
    for group in groups:
        dist.all_reduce(mean, group=group)
    mean /= len(stacked)
    for part in wide.unbind(0) if _one_by_one(wide) else (wide,):
        part.lerp_(mean, weight)
    if wide is not local:
        local.copy_(wide)


def _sum(wide: Tensor) -> Tensor:
    if not _one_by_one(wide):
        return wide.sum(0)
    first, *others = wide.unbind(0)
    total = first.clone()
    for expert in others:
        total += expert
    return total


def _one_by_one(experts: Tensor) -> bool:
    """Whether whole experts are worked on one after the other: on a CPU that is twice as fast as a reduction over the
    leading dimension, on a GPU every call costs. Of a shard, all experts may be elsewhere."""
    return experts.device.type == 'cpu' and len(experts) > 0


def _tensors(experts) -> Iterable[Tensor]:
    if isinstance(experts, Tensor):
        yield experts
    elif isinstance(experts, Experts):
        yield from experts.expert_parameters()
    elif isinstance(experts, nn.Module):
        for _, module in iter_experts(experts):
            yield from module.expert_parameters()
    else:
        for item in experts:
            yield from _tensors(item)


@torch.no_grad()
def expert_spread(model: nn.Module) -> dict[str, float]:
    """How far apart the experts are, by layer: the root mean square over experts of ‖W_i − W̄‖, over ‖W̄‖.

    W are all parameters of a layer that its experts do not share; residual experts are taken with their core. 0 are
    equal experts. Reads the device once; under ``fully_shard`` every rank has to call it.

    Returns:
        name of the module → spread; empty where there are no experts.
    """
    names, ratios = [], []
    for name, module in iter_experts(model):
        apart = size = 0.
        for key, parameter in module.body().named_parameters():
            stacked = module.stacked(key, parameter)
            if stacked is not None:
                stacked = whole(stacked)
                variance, mean = torch.var_mean(stacked.float(), 0, correction=0)
                apart, size = apart + variance.sum(), size + mean.square().sum()
        if isinstance(apart, Tensor):
            names.append(name)
            ratios.append((apart / size.clamp(min=1e-30)).sqrt())
    return dict(zip(names, torch.stack(ratios).tolist())) if ratios else {}


def attach_ewa(optimizer: Optimizer, model: nn.Module, share_rate: float = 0.3,
               schedule: str | Callable[[float], float] = 'linear', total_steps: int | None = None,
               start_step: int = 0, begin: float = 0., end: float = 1., every: int = 1,
               average_moments: bool = False) -> 'ExpertAveraging':
    """Average the experts of ``model`` after every real step of ``optimizer`` (not after one skipped for overflow).

    For a training loop of one's own, with or without DDP or ``torch.compile`` around the model::

        ewa3d.expand(model, [dict(type='EWAFFN', at='blocks.*.mlp', every=2)])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle = ewa3d.attach_ewa(optimizer, model, share_rate=0.3, schedule='linear', total_steps=epochs * len(loader))

    Args:
        optimizer: holds the experts' parameters (frozen ones may be missing).
        model: has experts, by :func:`ewa3d.expand`.
        share_rate: the largest β, in ``[0, (E - 1) / E]``.
        schedule: ``'constant'``, ``'linear'`` (0 to β), ``'cosine'`` or a function of progress that gives a factor
            (tried here at progress 0, ½ and 1).
        total_steps: optimizer steps of the whole training, not micro-batches; ``'constant'`` without ``begin`` and
            ``end`` needs none.
        start_step: steps already done, on resume.
        begin, end: fractions of the run between which experts are averaged; the schedule runs over this window.
        every: average after every k-th step.
        average_moments: treat the optimizer's moments (any state of a parameter's shape) alike.

    Returns:
        A handle with ``rate``, ``step`` and ``remove()``; also a context manager that removes itself.

    Raises:
        ValueError: the model has no experts, the optimizer lacks some of them, FSDP1 or ZeRO cut them up, another
            handle averages them already, or a number is out of range, the schedule's values included.
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``, or a count no integer.
    """
    rate = ShareRate(share_rate, schedule, total_steps, begin, end)
    return ExpertAveraging(optimizer, model, rate, start_step, every, average_moments)


class ExpertAveraging:
    """What :func:`attach_ewa` returns: averages after each optimizer step until :meth:`remove`.

    Attributes:
        step: optimizer steps done so far, the number of the next one; may be set. All else follows from it.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, share_rate: ShareRate, start_step: int = 0,
                 every: int = 1, average_moments: bool = False):
        _check_optimizer(optimizer)
        self._parameters = _expert_parameters(model)
        _check_schedule(share_rate, min(map(len, self._parameters.values())))
        _check_held(optimizer, self._parameters)
        self.step = start_step
        self._share_rate = share_rate
        self._every = check_integer('every', every, 1)
        self._average_moments = average_moments
        self._optimizer = optimizer
        self._modules = weakref.WeakSet(module for _, module in iter_experts(model))
        self._module_count = len(self._modules)
        _attached.setdefault(optimizer, []).append(self)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        self._step = check_integer('step', value, 0)

    @property
    def rate(self) -> float:
        """β of the next optimizer step; 0 outside ``begin`` to ``end``."""
        return self._share_rate(self.step)

    def remove(self) -> None:
        """Average no more. Calling it again does nothing."""
        self._hook.remove()
        attached = _attached.get(self._optimizer, [])
        if self in attached:
            attached.remove(self)

    def __enter__(self) -> 'ExpertAveraging':
        return self

    def __exit__(self, *exc) -> None:
        self.remove()

    def _after_step(self, optimizer: Optimizer, args, kwargs) -> None:
        found_inf = getattr(optimizer, 'found_inf', None)  # a fused optimizer is called on overflow and does nothing
        if found_inf is not None and float(found_inf):
            return
        self._warn_of_lost_experts()
        rate, number = self.rate, self.step + 1
        self.step = number
        if rate == 0 or number % self._every:
            return
        live = [p for p in self._parameters.values() if p.requires_grad]
        average_(live, rate)
        if self._average_moments:
            average_([s for p in live for s in optimizer.state.get(p, {}).values()
                      if isinstance(s, Tensor) and s.shape == p.shape], rate)

    def _warn_of_lost_experts(self) -> None:
        lost = self._module_count - len(self._modules)
        if lost:
            self._module_count -= lost  # say it once
            logger.warning('%d modules with experts are gone (fused?) while attach_ewa still averages their '
                           'parameters: remove() the handle, and make the optimizer anew', lost)


def _expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The experts' parameters by full name, checked to be whole along the expert dimension."""
    for name, module in model.named_modules():
        if any(cls.__name__ == 'FullyShardedDataParallel' for cls in type(module).__mro__):
            raise ValueError(f'{name or "the model"} is a FullyShardedDataParallel, which flattens parameters: experts '
                             f'cannot be averaged in it. Use DDP or fully_shard')
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for module_name, module in iter_experts(model):
        if not module.can_average:
            raise ValueError(f'{module_name!r} has low-rank experts, whose factors cannot be averaged; expand it with '
                             'full residuals (rank=None), or train it without EWA')
        for name, layer in module.named_modules():
            if name and any(cls.__name__ == 'FSDPModule' for cls in type(layer).__mro__):
                raise ValueError(f'fully_shard was called on {module_name}.{name}, a part of {module_name!r} that does '
                                 'not run by itself: call it on that module, or on the block around it')
        for parameter in module.expert_parameters():
            name = names[id(parameter)]
            if parameter.ndim == 0 or len(parameter) != module.num_experts:
                raise ValueError(f'{name} has the shape {tuple(parameter.shape)} and {module_name!r} has '
                                 f'{module.num_experts} experts: what cut it up leaves no mean to be taken. Shard it '
                                 'with fully_shard, or leave the experts whole')
            found[name] = parameter
    if not found:
        raise ValueError(f'{type(model).__name__} has no experts: call ewa3d.expand(model, rules) first')
    return found


def whole(tensor: Tensor) -> Tensor:
    """All of a DTensor, which every rank has to ask for; any other tensor itself.

    Shape:
        - any; returned with the size that it has over all ranks.
    """
    return tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor


def _local(tensor: Tensor) -> tuple[Tensor, list]:
    """The part of a DTensor on this rank, and the process groups over which its dimension 0 is shared out; any other
    tensor itself."""
    if not hasattr(tensor, 'to_local'):
        return tensor, []
    cuts = [i for i, placement in enumerate(tensor.placements) if getattr(placement, 'dim', None) == 0]
    return tensor.to_local(), [tensor.device_mesh.get_group(i) for i in cuts]


def _check_schedule(share_rate: ShareRate, num_experts: int) -> None:
    check_share_rate(share_rate.share_rate, num_experts)
    for progress in (0., 0.5, 1.):
        try:
            check_share_rate(share_rate.at(progress), num_experts)
        except ValueError as error:
            raise ValueError(f'the schedule at progress {progress:g}: {error}') from None


def _check_optimizer(optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        hint = '; pass its .optimizer' if isinstance(getattr(optimizer, 'optimizer', None), Optimizer) else ''
        raise TypeError(f'expected a torch.optim.Optimizer, got {type(optimizer).__name__}{hint}')
    if any(cls.__name__ == 'ZeroRedundancyOptimizer' for cls in type(optimizer).__mro__):
        raise ValueError('ZeroRedundancyOptimizer steps each parameter on one rank only; EWA needs every rank to hold '
                         'and step all experts')


def _check_held(optimizer: Optimizer, parameters: dict[str, nn.Parameter]) -> None:
    if not any(p.requires_grad for p in parameters.values()):
        logger.warning('attach_ewa: all experts are frozen (requires_grad=False), so nothing will be averaged')
    held = {id(p) for group in optimizer.param_groups for p in group['params']}
    missing = [name for name, p in parameters.items() if p.requires_grad and id(p) not in held]
    if missing:
        shown = ', '.join(missing[:6]) + (f' and {len(missing) - 6} more' if len(missing) > 6 else '')
        raise ValueError(f'the optimizer does not hold the experts {shown}; create it after ewa3d.expand()')
    own = {id(p) for p in parameters.values()}
    for other in _attached.get(optimizer, []):
        if own & {id(p) for p in other._parameters.values()}:
            raise ValueError('these experts are already averaged after the steps of this optimizer; remove() that '
                             'handle first')
