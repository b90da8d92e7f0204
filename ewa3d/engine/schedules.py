"""Share-rate schedules of EWA: functions of progress in [0, 1], nothing to save, exact on resume.

A new one is a function ``f(progress) -> factor`` in :data:`SCHEDULES`; the factor multiplies the share rate.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

from ewa3d.registry import nearest

__all__ = ['SCHEDULES', 'ShareRate', 'constant', 'linear', 'cosine']


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
        total_steps: optimizer steps of the whole training, an integer of at least 1.

    Raises:
        TypeError, ValueError: an argument is missing or out of range. KeyError: no schedule has this name.
    """
    share_rate: float
    schedule: str | Callable[[float], float]
    total_steps: int
    begin: float = 0.
    end: float = 1.

    def __post_init__(self):
        if isinstance(self.schedule, str):
            if self.schedule not in SCHEDULES:
                raise KeyError(f'share-rate schedule {self.schedule!r}: {nearest(self.schedule, SCHEDULES)}')
        elif not callable(self.schedule):
            raise TypeError(f'schedule is a name or a function of progress, got {self.schedule!r}')
        check_count('total_steps', self.total_steps, 1)
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f'begin and end are fractions of the run with 0 <= begin < end <= 1, '
                             f'got begin={self.begin!r}, end={self.end!r}')

    def __call__(self, step: int) -> float:
        progress = min(step / self.total_steps, 1.)
        if progress < self.begin or (progress >= self.end and self.end < 1):
            return 0.
        function = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return self.share_rate * float(function((progress - self.begin) / (self.end - self.begin)))


def check_count(name: str, value: int, least: int) -> int:
    """``value`` if it is an integer of at least ``least``."""
    if value is None:
        raise ValueError(f'{name} is missing: give the number of optimizer steps of the whole training')
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f'{name} is an integer, got {value!r}')
    if value < least:
        raise ValueError(f'{name} must be at least {least}, got {value}')
    return value
