"""The checks of values from configs."""
import numpy as np
import pytest

from ewa3d.checks import check_integer, check_number, is_integer, is_number, some


@pytest.mark.parametrize('value', [3, np.int64(3), np.uint8(3)])
def test_integers_of_every_kind(value):
    found = check_integer('depth', value, 1)
    assert found == 3 and type(found) is int


@pytest.mark.parametrize('value', [3., '3', None, True, np.float32(3), [3]])
def test_not_an_integer(value):
    with pytest.raises(TypeError, match='depth must be an integer, got'):
        check_integer('depth', value, 1)


def test_an_integer_too_small():
    with pytest.raises(ValueError, match='depth must be at least 1, got 0'):
        check_integer('depth', np.int32(0), 1)


@pytest.mark.parametrize('value', [0, 0.5, np.float32(0.5), np.int64(0)])
def test_numbers_of_every_kind(value):
    found = check_number('rate', value, '[0, 1)')
    assert found == value and type(found) is float


@pytest.mark.parametrize('within, value', [
    ('[0, 1)', 1), ('[0, 1)', -0.1), ('[0, 1]', 1.1), ('(0, inf)', 0), ('(0, inf)', float('inf')),
    ('[0, 1]', float('nan')), ('(0, inf)', np.float64('nan'))])
def test_a_number_outside(within, value):
    with pytest.raises(ValueError, match=r'rate must lie in [\[(]0, (1|inf)[\])], got'):
        check_number('rate', value, within)


@pytest.mark.parametrize('value', ['abc', None, True, [0.1], 1j])
def test_not_a_number(value):
    with pytest.raises(TypeError, match='rate must be a number, got'):
        check_number('rate', value)


def test_kinds_of_numbers():
    for value, integer, number in ((3, True, True), (np.int64(3), True, True), (3., False, True),
                                   (np.float32(3), False, True), (True, False, False), (np.bool_(True), False, False),
                                   ('3', False, False), (np.array([3]), False, False), (3j, False, False)):
        assert (is_integer(value), is_number(value)) == (integer, number), value


def test_some_of_many():
    assert some([]) == 'nothing' and some(['a']) == 'a' and some(range(3), 3) == '0, 1, 2'
    assert some(dict(a=1, b=2, c=3), 2) == 'a, b, … (3 in all)'
