"""The arithmetic of docs/scaling.md: each number of its tables and of its example, from the formulas in it."""
import re
from pathlib import Path

import pytest

DOC = (Path(__file__).resolve().parents[1] / 'docs' / 'scaling.md').read_text(encoding='utf-8')
GIB = 2**30


def parameters(blocks: int, width: int, experts: int = 1, every: int = 1) -> float:
    """N = P + (E - 1) · F of a stack of blocks: 12 C² a block, 8 C² of them in its FFN."""
    return blocks * width**2 * (12 + (experts - 1) * 8 / every)


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading."""
    lines = DOC[DOC.index(f'## {heading}'):].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith('|--') or line.startswith('|---'))
    table = []
    for line in lines[first + 1:]:
        if not line.startswith('|'):
            break
        table.append([cell.strip() for cell in line.strip('|').split('|')])
    return table


def digits(value: float, shown: str) -> str:
    """``value`` with as many digits behind the point as were shown."""
    return f'{value:.{len(shown.partition(".")[2])}f}'


def test_how_many_times_as_many_parameters():
    for experts, *cells in rows('Parameters'):
        for every, cell in zip((2, 1), cells):
            shown = cell.removesuffix(' P')
            found = digits(parameters(1, 1, int(experts), every) / 12, shown)
            assert found.rstrip('0').rstrip('.') == shown.rstrip('0').rstrip('.'), cell


def test_the_example():
    kinds = {'plain': (1, 1), 'EWA, E = 4, every second FFN': (4, 2), 'EWA, E = 4, every FFN': (4, 1),
             'EWA, E = 8, every second FFN': (8, 2)}
    table = rows('Example')
    assert [row[0] for row in table] == list(kinds)
    for name, *cells in table:
        N = parameters(48, 4096, *kinds[name])
        for value, shown in zip((N / 1e9, 16 * N / GIB, 16 * N / GIB / 8, 8 * N * 7 / 8 / 1e9), cells, strict=True):
            assert digits(value, shown) == shown, name


@pytest.mark.parametrize(('shown', 'value'), [
    (r'P = ([\d.]+) billion weights', parameters(48, 4096) / 1e9),
    (r'at N = ([\d.]+) billion', 60 * GIB / 16 / 1e9),
    (r'at the time, (\d+) million a block', 12 * 4096**2 / 1e6),
    (r'or (\d+) million in one with four experts', parameters(1, 4096, 4) / 1e6),
    (r'with four experts, ([\d.]+) GiB in 16 bits', 2 * parameters(1, 4096, 4) / GIB),
    (r'For 32 images \(([\d,]+) tokens\)', 32 * 257),
    (r'tokens\) these are (\d+) GiB without', 32 * 4096 * 32 * 257 * 48 / GIB),
    (r'with\s+it (\d+) GiB for the blocks', 4 * 4096 * 32 * 257 * 48 / GIB),
    (r'and (\d+) GiB for one block', 32 * 4096 * 32 * 257 / GIB),
    (r'6 P T = ([\d.]+) · 10¹⁴', 6 * parameters(48, 4096) * 32 * 257 / 1e14),
    (r'a rank, ([\d.]+) · 10¹⁴ with', 8 * parameters(48, 4096) * 32 * 257 / 1e14),
    (r'ViT-L of 24 × 1,024 \((\d+) million\)', parameters(24, 1024) / 1e6),
    (r'FFN has (\d+) million', parameters(24, 1024, 4, 2) / 1e6),
    (r'million, (\d+) GiB: DDP', 16 * parameters(24, 1024, 4, 2) / GIB),
])
def test_numbers_in_the_text(shown, value):
    found = re.search(shown, DOC)
    assert found, shown
    assert digits(value, found[1]) == found[1].replace(',', '')
