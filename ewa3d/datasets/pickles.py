"""Reading the pickles that data sets come in, without executing what is in them."""
import pickle
from pathlib import Path

import numpy as np

__all__ = ['read_numpy_pickle']


def _latin1(text, encoding: str = 'latin1') -> bytes:
    """What protocol 2 calls to make bytes; no other encoding is looked up."""
    if encoding not in ('latin1', 'latin-1') or not isinstance(text, str):
        raise pickle.UnpicklingError(f'bytes in the encoding {encoding!r}')
    return text.encode('latin1')


# The functions that numpy's own arrays and scalars are rebuilt with, under the names that numpy 1 and 2 pickle.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_FROMBUFFER = np.zeros(1).__reduce_ex__(5)[0]
_SCALAR = np.float32(0).__reduce__()[0]
ALLOWED = {('numpy', 'ndarray'): np.ndarray, ('numpy', 'dtype'): np.dtype, ('_codecs', 'encode'): _latin1}
for _core in ('numpy.core', 'numpy._core'):
    ALLOWED[f'{_core}.multiarray', '_reconstruct'] = _RECONSTRUCT
    ALLOWED[f'{_core}.multiarray', 'scalar'] = _SCALAR
    ALLOWED[f'{_core}.numeric', '_frombuffer'] = _FROMBUFFER


class _NumpyUnpickler(pickle.Unpickler):

    def find_class(self, module: str, name: str):
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is not an array')
        return ALLOWED[module, name]


def read_numpy_pickle(path: str | Path):
    """The content of a pickle made of lists, tuples, dicts, numbers, strings and numpy arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a pickle, it is cut off, or it asks for anything else than the above; none of it has run.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: there is no such file')
    with path.open('rb') as file:
        try:
            return _NumpyUnpickler(file, encoding='latin1').load()
        except Exception as error:
            raise ValueError(f'{path}: refused or broken pickle: {error}') from error
