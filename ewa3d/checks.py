"""Checks of values that people give: the message names the keyword, the value and what was expected."""
import math
import operator
from collections.abc import Iterable
from numbers import Integral, Real

__all__ = ['check_integer', 'check_number', 'is_integer', 'is_number', 'some']


def is_integer(value) -> bool:
    """Whether ``value`` is an integer, numpy's included; ``bool`` and 3.0 are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value) -> bool:
    """Whether ``value`` is a real number, numpy's included; ``bool`` is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_integer(name: str, value, least: int) -> int:
    """``value`` as an ``int`` of at least ``least``; numpy's integers will do, ``bool`` and 3.0 will not.

    Raises:
        TypeError: no integer. ValueError: a smaller one.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f'{name} must be an integer, got {value!r}')
    if number < least:
        raise ValueError(f'{name} must be at least {least}, got {number}')
    return number


def check_number(name: str, value, within: str = '[0, 1]') -> float:
    """``value`` as a finite ``float`` ``within`` an interval, such as ``'[0, 1)'`` or ``'(0, inf)'``.

    Raises:
        TypeError: no real number. ValueError: outside the interval.
    """
    if not is_number(value):
        raise TypeError(f'{name} must be a number, got {value!r}')
    low, high = map(float, within[1:-1].split(','))
    number = float(value)
    above = number >= low if within[0] == '[' else number > low
    below = number <= high if within[-1] == ']' else number < high
    if not (above and below and math.isfinite(number)):
        raise ValueError(f'{name} must lie in {within}, got {number}')
    return number


def some(items: Iterable, count: int = 6) -> str:
    """The first ``count`` of ``items`` for an error message, and how many there are."""
    items = list(map(str, items))
    return ', '.join(items[:count]) + (f', … ({len(items)} in all)' if len(items) > count else '') or 'nothing'
