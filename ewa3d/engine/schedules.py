"""Schedules: functions of progress or of the optimizer step, nothing to save, exact on resume.

A new share-rate schedule of EWA is a function ``f(progress) -> factor`` in :data:`SCHEDULES`; the factor multiplies the
share rate.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

from ewa3d.checks import check_integer, check_number
from ewa3d.registry import nearest

__all__ = ['SCHEDULES', 'Ramp', 'ShareRate', 'constant', 'linear', 'cosine']


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.


def linear(progress: float) -> float:
    """From 0 to 1."""
    return progress


def cosine(progress: float) -> float:
    """From 0 to 1 along half a cosine, flat at both ends."""
    return (1 - math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = dict(constant=constant, linear=linear, cosine=cosine)


@dataclass(frozen=True)
class ShareRate:
    """β of an optimizer step: ``share_rate * schedule((progress - begin) / (end - begin))``, 0 outside the window.

    ``progress = step / total_steps`` with steps counted from 0, so the window ``[begin, end)`` of fractions with
    ``end=0.5`` is exactly the first half, and ``end=1`` is the rest of the run, whatever comes after it included.

    Args:
        share_rate: the largest β, at least 0.
        schedule: a name of :data:`SCHEDULES` or a function of progress.
        total_steps: optimizer steps of the whole training, an integer of at least 1; ``'constant'`` over the whole
            run does without.

    Raises:
        TypeError, ValueError: an argument is missing or out of range. KeyError: no schedule has this name.
    """
    share_rate: float
    schedule: str | Callable[[float], float]
    total_steps: int | None = None
    begin: float = 0.
    end: float = 1.

    def __post_init__(self):
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise KeyError(f'share-rate schedule {self.schedule!r}: {nearest(self.schedule, SCHEDULES)}')
        elif not callable(self.schedule):
            raise TypeError(f'schedule is a name or a function of progress, got {self.schedule!r}')
        begin, end = check_number('begin', self.begin), check_number('end', self.end)
        if begin >= end:
            raise ValueError(f'begin and end are fractions of the run with 0 <= begin < end <= 1, '
                             f'got begin={begin!r}, end={end!r}')
        if self.total_steps is not None:
            check_integer('total_steps', self.total_steps, 1)
        elif self.schedule not in ('constant', constant) or (begin, end) != (0, 1):
            raise ValueError('total_steps is missing: give the number of optimizer steps of the whole training (only '
                             "schedule='constant' from begin=0 to end=1 does without)")

    def __call__(self, step: int) -> float:
        progress = min(step / self.total_steps, 1.) if self.total_steps else 0.
        if progress < self.begin or (progress >= self.end and self.end < 1):
            return 0.
        return self.at((progress - self.begin) / (self.end - self.begin))

    def at(self, progress: float) -> float:
        """β at a fraction of the window.

        Raises:
            TypeError: the schedule gives no number.
        """
        function = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        factor = function(progress)
        try:
            return float(self.share_rate) * float(factor)
        except TypeError:
            raise TypeError(f'the schedule gives {factor!r} at progress {progress:g}, not a number') from None


@dataclass(frozen=True)
class Ramp:
    """A value of an optimizer step, counted from 0: ``start`` until step ``begin``, then along half a cosine to
    ``target`` over ``length`` steps, and ``target`` from there on.

    Args:
        length, begin: an integer is a number of optimizer steps; a float is a share of the run's ``total_steps``.

    Raises:
        TypeError, ValueError: a value is no number, or out of range.
    """
    start: float
    target: float
    length: int | float = 1.
    begin: int | float = 0

    def __post_init__(self):
        for name in ('start', 'target'):
            check_number(name, getattr(self, name), '(-inf, inf)')
        for name, least in (('length', 1), ('begin', 0)):
            value = getattr(self, name)
            if isinstance(value, float):
                check_number(f'{name} as a share of the run', value, '(0, 1]' if least else '[0, 1]')
            else:
                check_integer(f'{name} in optimizer steps', value, least)

    def __call__(self, step: int, total_steps: int) -> float:
        begin, length = (value * total_steps if isinstance(value, float) else value
                         for value in (self.begin, self.length))
        progress = min(max((step - begin) / length, 0.), 1.)
        return self.start + (self.target - self.start) * cosine(progress)
