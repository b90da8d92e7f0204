"""Reading the pickles that data sets come in, without executing what is in them.

A pickle names functions and the arguments to call them with. Even numpy's own are not safe with arguments of somebody's
choice (a made-up dtype turns bytes into pointers), so every name stands for a class of this file: it takes down what
the pickle says about an array, checks it, and the array is made here.
"""
import math
import pickle
import re
import struct
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import numpy as np

__all__ = ['ALLOWED', 'read_numpy_pickle', 'with_arrays']


def refuse(what: str):
    raise pickle.UnpicklingError(what)


class StandIn:
    """What a name in a pickle means. Classes, as a pickle may set attributes of functions."""
    __slots__ = ()

    def __setstate__(self, state):
        refuse(f'a state for {type(self).__name__}')


class Bytes(StandIn):
    """``_codecs.encode``: what protocol 2 calls to make bytes (``bytes`` itself where there are none)."""

    def __new__(cls, text: str = '', encoding: str = 'latin1') -> bytes:
        if encoding not in ('latin1', 'latin-1') or not isinstance(text, str):
            refuse(f'bytes in the encoding {encoding!r}')
        return text.encode('latin1')


class NdArray(StandIn):
    """``numpy.ndarray``: a pickle only mentions it."""

    def __new__(cls, *args):
        refuse('an array that is not made by _reconstruct')


class Dtype(StandIn):
    """``numpy.dtype``: plain numbers only."""
    __slots__ = ('code', 'order')

    def __init__(self, code: str, align=False, copy=False):
        if not isinstance(code, str) or not re.fullmatch('b1|f[248]|[iu][1248]', code):
            refuse(f'an array of dtype {code!r}, numbers were expected')
        self.code, self.order = code, '='

    def __setstate__(self, state: tuple):
        _, order, subarray, names, fields, *_ = state
        if order not in ('<', '>', '|', '=') or (subarray, names, fields) != (None, None, None):
            refuse(f'a dtype {self.code} with the state {state!r}')
        self.order = order


class Array(StandIn):
    """``_reconstruct``: an array; its content comes as the state."""
    __slots__ = ('array',)

    def __init__(self, kind: type, shape=(0,), code=b'b'):
        if kind is not NdArray:
            refuse('an array of another class than ndarray')

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran, content = state
        self.array = plain_array(shape, dtype, 'F' if fortran else 'C', content)


class FromBuffer(Array):
    """``_frombuffer``: an array in protocol 5."""
    __slots__ = ()

    def __init__(self, content, dtype: Dtype, shape: tuple, order: str, axis_order=None):
        if order not in ('C', 'F'):
            refuse(f'an array in the order {order!r}')
        self.array = plain_array(shape, dtype, order, content)


class Scalar(Array):
    """``scalar``: a number of numpy's."""
    __slots__ = ()

    def __init__(self, dtype: Dtype, content=b''):
        self.array = plain_array((), dtype, 'C', content)[()]


def plain_array(shape: tuple, dtype: Dtype, order: str, content) -> np.ndarray:
    """A read-only array on bytes that are exactly as many as it needs."""
    if isinstance(content, str):  # Python 2 made no difference
        content = content.encode('latin1')
    if type(dtype) is not Dtype or type(shape) is not tuple or not isinstance(content, (bytes, bytearray)):
        refuse('an array of something else than numbers')
    if not all(type(n) is int and n >= 0 for n in shape):
        refuse(f'an array of the shape {shape!r}')
    plain = np.dtype(dtype.order + dtype.code)
    if math.prod(shape) * plain.itemsize != len(content):
        refuse(f'an array of the shape {shape} and dtype {plain} in {len(content)} bytes')
    return np.ndarray(shape, plain, bytes(content), order=order)


ALLOWED = {('numpy', 'ndarray'): NdArray, ('numpy', 'dtype'): Dtype, ('_codecs', 'encode'): Bytes,
           ('__builtin__', 'bytes'): Bytes}
for _core in ('numpy.core', 'numpy._core'):  # as numpy 1 and as numpy 2 call it
    ALLOWED[f'{_core}.multiarray', '_reconstruct'] = Array
    ALLOWED[f'{_core}.multiarray', 'scalar'] = Scalar
    ALLOWED[f'{_core}.numeric', '_frombuffer'] = FromBuffer


KEYS = (str, bytes, int, float, bool)


class _NumpyUnpickler(pickle._Unpickler):
    """The one in C allocates as many entries as a pickle says it has. What this one hashes is plain: a tuple of tuples,
    each of which is there twice, would take for ever."""
    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            refuse(f'it asks for {module}.{name}, which is not an array')
        return ALLOWED[module, name]

    def _load_bytes(self):
        size, = struct.unpack('<Q', self.read(8))
        content = self.read(size)  # a bytearray would take the memory first
        if len(content) < size:
            refuse('it is cut off')
        self.append(content)

    def _load_set(self):
        refuse('a set')

    dispatch.update({pickle.BYTEARRAY8[0]: _load_bytes, pickle.ADDITEMS[0]: _load_set, pickle.FROZENSET[0]: _load_set})

    def _load_item(self):
        check_keys(self.stack[-2:-1])
        self.load_setitem()

    def _load_items(self):
        check_keys(self.stack[::2])
        self.load_setitems()

    def _load_dict(self):
        check_keys(self.stack[::2])
        self.load_dict()

    dispatch.update({pickle.SETITEM[0]: _load_item, pickle.SETITEMS[0]: _load_items, pickle.DICT[0]: _load_dict})


def check_keys(keys: list) -> None:
    for key in keys:
        if type(key) not in KEYS:
            refuse(f'a dict with a {type(key).__name__} as a key')


def with_arrays(value, seen: dict):
    """``value`` with the arrays in the place of what stands for them. What is in it twice is looked at once."""
    if isinstance(value, Array):
        return value.array
    if isinstance(value, (StandIn, type)):
        refuse('something else than arrays and numbers')
    if isinstance(value, Namespace):
        with_arrays(vars(value), seen)
    if not isinstance(value, (list, tuple, dict)):
        return value
    if id(value) not in seen:
        seen[id(value)] = value, value  # keeps it alive, so that its id stays its own
        if isinstance(value, tuple):
            seen[id(value)] = value, tuple(with_arrays(v, seen) for v in value)
        else:
            for key in range(len(value)) if isinstance(value, list) else value:
                value[key] = with_arrays(value[key], seen)
    return seen[id(value)][1]


def read_numpy_pickle(path: str | Path):
    """The content of a pickle made of lists, tuples, dicts, numbers, strings and numpy arrays of numbers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a pickle, it is cut off, or it asks for anything else than the above; none of it has run.
    """
    from ewa3d.engine.bounds import check_tree
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such file')
    with path.open('rb') as file:
        try:
            content = with_arrays(_NumpyUnpickler(file, encoding='latin1').load(), {})
            check_tree(content, path.stat().st_size)
            return content
        except Exception as error:
            raise ValueError(f'{path}: refused or broken pickle: {str(error) or "it is cut off"}') from error
