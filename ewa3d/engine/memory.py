"""Keep freed memory in the process: a training step frees and takes the same large buffers again and again."""
import ctypes
import sys

__all__ = ['keep_freed_memory']

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h
MIB = 2 ** 20


def keep_freed_memory() -> bool:
    """Tell glibc's allocator not to hand activations back to the system after every step.

    By default a freed block of some MiB is unmapped and its next user pays a page fault for every 4 KiB, which on
    virtual machines can cost more than the arithmetic. Numbers do not change. Returns whether it could be done (Linux
    with glibc); elsewhere nothing happens.
    """
    if not sys.platform.startswith('linux'):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 1024 * MIB), (M_TOP_PAD, 64 * MIB))
    return all([mallopt(key, value) == 1 for key, value in settings])  # noqa: C419 (every call is made)
