"""Pickles of arrays: every protocol, and hostile ones that must be refused without running or allocating anything."""
import os
import pickle

import numpy as np
import pytest

from ewa3d.datasets.pickles import read_numpy_pickle

RECONSTRUCT = np.zeros(1).__reduce__()[0]
FROMBUFFER = np.zeros(1).__reduce_ex__(5)[0]
SCALAR = np.float32(0).__reduce__()[0]


class Call:
    """Pickles as the call of a function, with a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def dtype(code='f4', *state):
    return Call(np.dtype, (code, False, True), *([state] if state else []))


def array(shape, dtype, content, fortran=False):
    return Call(RECONSTRUCT, (np.ndarray, (0,), b'b'), (1, shape, dtype, fortran, content))


@pytest.fixture
def read(tmp_path):
    def read(content, protocol=2):
        file = tmp_path / 'x.pkl'
        file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return read_numpy_pickle(file)
    return read


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('code', ['f2', 'f4', '>f8', 'i1', 'u1', '<i2', '>u4', 'i8'])
def test_arrays_in_every_protocol(read, protocol, code):
    base = np.arange(24).astype(code)
    content = [base.reshape(2, 3, 4), (base.reshape(4, 6).T, base[:0], base[3]), {'a': base.reshape(6, 4)[:, 1:]}, 'x']
    found = read(content, protocol)
    a, (b, c, d), e, x = found
    for one, other in ((a, content[0]), (b, content[1][0]), (c, content[1][1]), (d, content[1][2]),
                       (e['a'], content[2]['a'])):
        assert np.array_equal(one, other) and one.dtype == other.dtype and np.shape(one) == np.shape(other)
    assert x == 'x' and isinstance(d, np.generic)


def test_shared_content(read):
    cloud = np.ones((2, 3))
    one, other = read([(cloud, 1), (cloud, 2)])
    assert np.array_equal(one[0], cloud) and np.array_equal(other[0], cloud)


def test_content_that_unfolds_without_end(read):
    """What reads it on, or tells in an error what it is, would never end."""
    nested, circle = (np.ones((2, 3)),), [1]
    for _ in range(60):
        nested = (nested, nested)
    circle.append(circle)
    for content in (nested, circle):
        with pytest.raises(ValueError, match='hold one another'):
            read(content)


POINTERS = dtype('V8', 3, '|', None, ('f',), {'f': (dtype('O'), 0)}, 8, 1, 0)  # bytes as objects, by a false flag
FLOAT = dtype('f4', 3, '<', None, None, None, -1, -1, 0)


@pytest.mark.parametrize('content', [
    array((1,), POINTERS, b'\x41' * 8), array((1,), dtype('O'), [1]), array((1,), dtype('V8'), b'a' * 8),
    array((1,), dtype('f1'), b'a'), array((1,), dtype('S4'), b'aaaa'), array((1,), dtype('M8[s]'), b'a' * 8),
    array((1,), dtype('f4', 3, '|', None, ('f',), {'f': (dtype('O'), 0)}, 8, 1, 0), b'a' * 8),
    array((1,), dtype('f4', 3, '?', None, None, None, -1, -1, 0), b'a' * 4),
    array((1,), dtype('f4', 3, '<', (dtype('f4'), (9,)), None, None, -1, -1, 0), b'a' * 4),
    array((2,), FLOAT, b'a' * 4), array((10**12,), FLOAT, b''), array((2**62, 4), FLOAT, b''),
    array((-1, -1), FLOAT, b'a' * 4), array((True,), FLOAT, b'a' * 4), array((1.0,), FLOAT, b'a' * 4),
    array([1], FLOAT, b'a' * 4), array((1,), 'f4', b'a' * 4), array((1,), FLOAT, [1]),
    Call(RECONSTRUCT, (np.dtype, (0,), b'b')), Call(np.ndarray, ((10**11,),)), Call(np.dtype, ([('a', 'O')],)),
    Call(RECONSTRUCT, (np.ndarray, (10**12,), b'b')), Call(SCALAR, (dtype('O'), 5)), Call(SCALAR, (FLOAT, b'a' * 8)),
    Call(FROMBUFFER, (b'a' * 8, POINTERS, (1,), 'C')), Call(FROMBUFFER, (b'a' * 4, FLOAT, (10**12,), 'C')),
    Call(FROMBUFFER, (b'a' * 4, FLOAT, (1,), 'K')), Call(os.mkdir, ('ran',)),
    b'\x80\x02' + b'cnumpy\nndarray\n' + b'N}X\x03\x00\x00\x00newI1\ns\x86b.',  # attributes for a class
    b'\x80\x02c_codecs\nencode\nN}X\x03\x00\x00\x00newI1\ns\x86b.',
    b'\x80\x02cnumpy\ndtype\n)\x81.', b'', b'junk', b'\x80\x02]'], ids=range(34))
def test_hostile_ones_are_refused(read, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, Call) and content.reduced[0] is RECONSTRUCT and len(content.reduced) == 2:
        content = [content]  # an array without content
    with pytest.raises(ValueError, match=r'x\.pkl: refused or broken'):
        read(content)
    assert not (tmp_path / 'ran').exists()


def test_a_memo_of_a_wrong_size_allocates_nothing(read):
    assert read(b'\x80\x02]r\xff\xff\xff\xff.') == []
