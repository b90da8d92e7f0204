"""How variants are timed, and what is reported.

A shared machine drifts: what is timed one minute after the other differs by more than the effect that is looked for.
So the variants of a :class:`Case` take turns, each round in another order, and a ratio is the median over the rounds
of (variant / baseline) within one round. Numbers are reported, never judged.
"""
import ctypes
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ewa3d.engine.environment import describe_hardware, versions

__all__ = ['Settings', 'Case', 'Row', 'Work', 'measure', 'table', 'report', 'CLOCKS', 'DTYPES']

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16}
# On a busy machine the processor time of this process tells more than the time that passes; what other processes work
# for it, such as those of a data loader, is not in it.
CLOCKS = {'wall': lambda: time.perf_counter(), 'cpu': lambda: time.process_time()}
MIN_SECONDS = 0.02  # work shorter than this is repeated within one timing


@dataclass(frozen=True)
class Settings:
    """What a suite may depend on. ``quick`` asks for tiny sizes: a check that the suite runs, not a measurement."""
    device: torch.device = field(default_factory=lambda: torch.device('cpu'))
    dtypes: tuple[str, ...] = ('fp32', 'bf16')
    threads: int = 1
    repeat: int = 15
    quick: bool = False
    seed: int = 0
    clock: str = 'wall'

    def autocast(self, dtype: str):
        """The context in which a variant of ``dtype`` (a key of ``DTYPES``) runs; fp32 is autocast switched off."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype != 'fp32')


@dataclass
class Case:
    """Variants of one piece of work, the first being the baseline: name → a function that builds the timed function.

    Building is not timed; what is built may be a :class:`Work`. The order of ``variants`` is the order of the table's
    rows. ``memory`` asks for the peak of what one call allocates, too. ``skipped`` are variants that cannot be measured
    here, and why.
    """
    name: str
    variants: dict[str, Callable[[], Callable[[], object]]]
    memory: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not self.variants:
            raise ValueError(f'case {self.name!r} has no variants; expected at least a baseline')


@dataclass
class Work:
    """A function to be timed and what else is known of it: columns ``facts`` of the table, and how many ``items`` a
    call works through, of which the table shows the number a second."""
    function: Callable[[], object]
    facts: dict[str, float] = field(default_factory=dict)
    items: int = 0

    def __call__(self):
        return self.function()


@dataclass
class Row:
    """One variant's timings, in seconds; ``ratios`` are to the baseline, round by round. ``peak`` is in bytes."""
    suite: str
    case: str
    variant: str
    seconds: list[float]
    ratios: list[float] = field(default_factory=list)
    peak: int | None = None
    facts: dict[str, float] = field(default_factory=dict)
    items: int = 0

    def summary(self) -> dict:
        """Flat numbers of this row: what the JSON file holds next to the raw timings."""
        median = statistics.median(self.seconds)
        return dict(suite=self.suite, case=self.case, variant=self.variant, median_s=median,
                    min_s=min(self.seconds), max_s=max(self.seconds),
                    ratio=statistics.median(self.ratios), ratio_min=min(self.ratios), ratio_max=max(self.ratios),
                    **{} if self.peak is None else dict(peak_bytes=self.peak),
                    **dict(items_per_s=self.items / median) if self.items else {},
                    **dict(facts=self.facts) if self.facts else {}, seconds=self.seconds)


def measure(case: Case, settings: Settings, suite: str = '') -> list[Row]:
    """Time the variants of ``case`` in turns, ``settings.repeat`` rounds, after two untimed calls of each.

    Raises:
        ValueError: fewer than one round.
    """
    if settings.repeat < 1:
        raise ValueError(f'repeat = {settings.repeat}; expected at least 1')
    work = {}
    for name, build in case.variants.items():
        torch.manual_seed(settings.seed)  # every variant starts from the same numbers
        work[name] = build()
    once = []
    for function in work.values():
        _seconds(function, 1, settings)  # the first call allocates, compiles, fills caches
        once.append(_seconds(function, 1, settings))
    loops = max(1, min(1000, round(MIN_SECONDS / max(*once, 1e-9))))
    rows = {name: Row(suite, case.name, name, [], facts=getattr(function, 'facts', {}),
                      items=getattr(function, 'items', 0)) for name, function in work.items()}
    order, shuffle = list(work), random.Random(settings.seed).shuffle
    for _ in range(settings.repeat):
        shuffle(order)
        for name in order:
            rows[name].seconds.append(_seconds(work[name], loops, settings))
    baseline = rows[next(iter(work))].seconds
    for name, row in rows.items():
        row.ratios = [mine / base for mine, base in zip(row.seconds, baseline)]
        row.peak = peak_memory(work[name], settings.device) if case.memory else None
    return list(rows.values())


def peak_memory(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes that one call holds at a time, beside those that were there before: of tensors, and on a CPU,
    where Linux tells, of everything, numpy's arrays and scipy's trees included."""
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    peak = max(itertools.accumulate((event.nbytes() for event in events), initial=0))
    del events, profile
    gc.collect()
    before = _resident(forget_peak=True)
    if before is None:
        return peak
    function()
    return max(peak, _resident()['VmHWM'] - before['VmRSS'])


def _resident(forget_peak: bool = False) -> dict[str, int] | None:
    """Bytes of this process in memory now and at their peak, ``VmRSS`` and ``VmHWM``; ``None`` where that is not
    known. ``forget_peak`` gives what is free back to the system and begins a new peak."""
    try:
        if forget_peak:
            ctypes.CDLL(None).malloc_trim(0)
            Path('/proc/self/clear_refs').write_text('5')
        lines = Path('/proc/self/status').read_text().splitlines()
    except (OSError, AttributeError):  # another system, another C library, no permission
        return None
    found = (line.split() for line in lines if line.startswith(('VmRSS', 'VmHWM')))
    return {name.rstrip(':'): int(number) * 1024 for name, number, _ in found}


def table(rows: Iterable[Row]) -> str:
    """A table in Markdown, one row a variant, times in milliseconds; with a column for whatever else is known."""
    rows = [row.summary() for row in rows]
    more = {'peak MiB': lambda row: row['peak_bytes'] / 2**20} if any('peak_bytes' in row for row in rows) else {}
    if any('items_per_s' in row for row in rows):
        more['items / s'] = lambda row: row['items_per_s']
    for name in dict.fromkeys(name for row in rows for name in row.get('facts', ())):
        more[name] = lambda row, name=name: row['facts'][name]
    lines = ['| suite | case | variant | median ms | min | max | ratio | ratio min–max |'
             + ''.join(f' {name} |' for name in more), '|---|---|---|--:|--:|--:|--:|--:|' + '--:|' * len(more)]
    for row in rows:
        times = ' | '.join(_ms(row[key]) for key in ('median_s', 'min_s', 'max_s'))
        lines.append(f'| {row["suite"]} | {row["case"]} | {row["variant"]} | {times} | {row["ratio"]:.3f} '
                     f'| {row["ratio_min"]:.3f}–{row["ratio_max"]:.3f} |'
                     + ''.join(_cell(row, value) for value in more.values()))
    return '\n'.join(lines)


def _cell(row: dict, value: Callable[[dict], float]) -> str:
    """What a further column says of a row that has it."""
    try:
        number = value(row)
    except KeyError:
        return ' |'
    return f' {number:,.0f} |' if isinstance(number, int) or number >= 100 else f' {number:.3g} |'


def report(rows: Iterable[Row], settings: Settings, skipped: Iterable[dict] = ()) -> dict:
    """Everything that a number needs to mean something, JSON-able: hardware, versions, settings, rows with spread, and
    what was ``skipped``."""
    options = {**asdict(settings), 'device': str(settings.device)}
    return dict(format=1, hardware=describe_hardware(settings.device), versions=versions(), settings=options,
                rows=[row.summary() for row in rows], skipped=list(skipped))


def _seconds(function: Callable, loops: int, settings: Settings) -> float:
    clock, gpu = CLOCKS[settings.clock], settings.device.type == 'cuda'
    if gpu:
        torch.cuda.synchronize(settings.device)
    start = clock()
    for _ in range(loops):
        function()
    if gpu:
        torch.cuda.synchronize(settings.device)
    return (clock() - start) / loops


def _ms(seconds: float) -> str:
    return f'{seconds * 1e3:.3g}' if seconds < 0.1 else f'{seconds * 1e3:.0f}'
