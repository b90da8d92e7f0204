"""The command line of the benchmarks, ``ewa3d bench`` and ``tools/bench.py``."""
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ewa3d.bench import (
    data,
    detection,
    latency,
    layers,
    memory,
    mixers,
    ops,
    parts,
    pretrain,
    relatives,
    scaling,
    step,
    vit,
)
from ewa3d.bench.harness import CLOCKS, DTYPES, Case, Row, Settings, measure, report, table
from ewa3d.cli.errors import one_line
from ewa3d.cli.options import Parser
from ewa3d.engine.memory import keep_freed_memory
from ewa3d.files import atomic_write, check_writable
from ewa3d.registry import nearest

__all__ = ['SUITES', 'main', 'run']

# A suite is a function from settings to cases. A new one is a module with such a function and a line here.
SUITES: dict[str, Callable[[Settings], Iterator[Case]]] = {
    'step': step.cases,          # training steps: plain, EWA, as published
    'latency': latency.cases,    # inference: plain, and fused from EWA and its relatives, with parameters and FLOPs
    'relatives': relatives.cases,  # training steps of the small classifier with each relative
    'data': data.cases,          # loaders by workers: clouds, scenes, images, on generated files
    'memory': memory.cases,      # peaks of a step by batch and points, with and without activation checkpointing
    'scaling': scaling.cases,    # steps of several processes, with the share that exchanging gradients takes
    'vit': vit.cases,            # the same of timm's ViT-S in a plain loop
    'pretrain': pretrain.cases,  # Point-MAE's pretraining step: naive, ours
    'parts': parts.cases,        # part segmentation: shares of a step, interpolation
    'detection': detection.cases,  # 3DETR's forward pass: time and memory of the whole and its parts
    'layers': layers.cases,      # one FFN, forward and backward
    'mixers': mixers.cases,      # attention, S4D and S4 from 64 to 16k tokens: time and memory
    'ops': ops.cases,            # operators on points and boxes against portable forms
}


def run(suites: Sequence[str], settings: Settings, tell: Callable[[Row], None] = lambda row: None,
        skip: Callable[[dict], None] = lambda what: None, part: str = '') -> list[Row]:
    """Measure the cases of ``suites``; ``tell`` hears of each row when its case is done, ``skip`` of what cannot be
    measured here: ``suite``, ``case``, ``variant`` (or ``None`` for all) and ``reason``. Only cases with ``part`` in
    their name.

    Raises:
        ValueError: a suite that does not exist.
    """
    for name in suites:
        if name not in SUITES:
            raise ValueError(f'no suite {name!r}; {nearest(name, SUITES)}')
    rows = []
    for name in suites:
        for case in _cases(name, settings, skip):
            if part not in case.name:
                continue
            for variant, reason in case.skipped.items():
                skip(dict(suite=name, case=case.name, variant=variant, reason=reason))
            try:
                found = measure(case, settings, name)
            except ImportError as error:
                skip(dict(suite=name, case=case.name, variant=None, reason=one_line(error)))
                continue
            rows += found
            for row in found:
                tell(row)
    return rows


def _cases(name: str, settings: Settings, skip: Callable[[dict], None]) -> Iterator[Case]:
    """The cases of a suite, up to one that needs a package which is not there."""
    try:
        yield from SUITES[name](settings)
    except ImportError as error:
        skip(dict(suite=name, case=None, variant=None, reason=one_line(error)))


def main(argv: Sequence[str] | None = None) -> int:
    """``python tools/bench.py [suite ...] [--threads N] [--dtype fp32 bf16] [--repeat R] [--clock cpu] [--out FILE]
    [--case PART_OF_A_NAME] [--quick]``"""
    parser = Parser('ewa3d bench', description='Compare variants in one run; reports, never judges.')
    parser.add_argument('suites', nargs='*', metavar='suite', help=f'of {", ".join(SUITES)}; all by default')
    parser.add_argument('--case', default='', help='only cases with this in their name (default: all)')
    parser.add_argument('--threads', type=int, default=1, help='compute threads (default: %(default)s)')
    parser.add_argument('--dtype', nargs='+', choices=DTYPES, default=list(DTYPES), help='default: all')
    parser.add_argument('--repeat', type=int, default=15, help='rounds in which the variants take turns')
    parser.add_argument('--device', default='cpu', help='cpu, cuda or cuda:N (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--clock', choices=CLOCKS, default='wall',
                        help="'cpu': processor time of this process, for a busy machine (default: %(default)s)")
    parser.add_argument('--out', '--json', help='write hardware, versions, settings and all timings to this JSON file')
    parser.add_argument('--quick', action='store_true', help='tiny sizes: does it run? Its numbers mean nothing.')
    args = parser.parse_args(argv)
    if args.threads < 1 or args.repeat < 1:
        parser.error(f'--threads {args.threads} --repeat {args.repeat}: both must be at least 1')
    device = _device(args.device, parser)
    unknown = next((name for name in args.suites if name not in SUITES), None)
    if unknown is not None:
        parser.error(f'no suite {unknown!r}; {nearest(unknown, SUITES)}')
    if args.out:
        check_writable(Path(args.out).parent, '--out: the folder')
    keep_freed_memory()  # as the Runner does: a step is timed under the conditions of a training run
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    settings = Settings(device, tuple(args.dtype), args.threads, args.repeat, args.quick, args.seed, args.clock)
    rows, skipped = [], []

    def tell(row: Row) -> None:
        rows.append(row)
        _progress(row)
    try:
        run(args.suites or list(SUITES), settings, tell, skipped.append, args.case)
    finally:
        torch.set_num_threads(threads)
        if rows or skipped:  # hours of measurements are not lost to an error in what comes after them
            _tell_all(report(rows, settings, skipped), rows, args.out)
    return 0


def _tell_all(result: dict, rows: list[Row], out: str | None) -> None:
    reasons = dict.fromkeys(f'skipped: {what["suite"]}, {what["variant"] or what["case"] or "what follows"}: '
                            f'{what["reason"]}' for what in result['skipped'])
    _say(_describe(result), table(rows), *(['\n'.join(reasons)] if reasons else []), sep='\n\n')
    if out:
        _say(f'written to {atomic_write(out, json.dumps(result, indent=1) + chr(10))}')


def _device(name: str, parser: Parser) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ('cpu', 'cuda'):
        parser.error(f'--device {name}: cpu, cuda or cuda:N was expected')
    if device.type == 'cuda' and not torch.cuda.is_available():
        parser.error(f'--device {name}: torch sees no CUDA device here')
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        parser.error(f'--device {name}: torch sees {torch.cuda.device_count()} CUDA device(s) here')
    return device


def _describe(result: dict) -> str:
    machine, kit = result['hardware'], result['versions']
    settings = result['settings']
    where = machine['gpu'] or f'{machine["cpu"]}, {machine["usable_cores"]} of {machine["cores"]} cores usable'
    quick = '; --quick: the numbers mean nothing' if settings['quick'] else ''
    clock = '' if settings['clock'] == 'wall' else ' of processor time'
    return (f'{where}; {settings["threads"]} thread(s), {settings["repeat"]} rounds{clock}; torch {kit["torch"]}, '
            f'Python {kit["python"]}; ratio: median over rounds of time / baseline (first variant of its case){quick}')


def _progress(row: Row) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f'{row.suite} · {row.case} · {row.variant}: {row.summary()["median_s"] * 1e3:.3g} ms\n')


def _say(*parts: str, sep: str = '\n') -> None:
    sys.stdout.write(sep.join(parts) + '\n')
