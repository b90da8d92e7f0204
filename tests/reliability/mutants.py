"""Files that are damaged a little, and what becomes of them in a process of its own."""
import json
import os
import random
import resource
from collections.abc import Callable, Iterable
from pathlib import Path

SECONDS = 120  # of processor time for all of them together
MEMORY = 3 << 30  # bytes that the process may ask for beyond what it has


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite, repeat or remove a part, or replace a number by another."""
    if not raw:
        return b'\0'
    data, at = bytearray(raw), rng.randrange(len(raw))
    kind = rng.randrange(6)
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at:at + 8] = rng.choice([b'\xff' * 8, b'\0' * 8, b'nan inf ', b'-1 1e30 ', b'9' * 8])
    elif kind == 3:
        data[at:at] = data[max(0, at - 16):at]
    elif kind == 4:
        del data[at:at + rng.randrange(1, 16)]
    else:
        digits = [i for i, byte in enumerate(raw) if chr(byte).isdigit()] or [at]
        data[rng.choice(digits)] = rng.choice(b'0123456789-.e')
    return bytes(data)


def verdicts(judge: Callable[..., str], cases: Iterable) -> list[str]:
    """``judge(case)`` of each in one fork, within bounds: libraries in C may take their process down. The list ends
    where that happened."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            used = int(Path('/proc/self/statm').read_text().split()[0]) * os.sysconf('SC_PAGE_SIZE')
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            for case in cases:
                os.write(into, (json.dumps(judge(case)[:700]) + '\n').encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as file:
        found = [json.loads(line) for line in file]
    os.waitpid(pid, 0)
    return found
