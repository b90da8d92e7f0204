"""``compare RUN_DIR...``: the results of runs as a table, a row for all seeds of a config.

Rows that were judged on other data, another split or another number of points do not compare, and are refused.
"""
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ewa3d.evaluation import is_of_one_class
from ewa3d.registry import nearest
from ewa3d.runs import JUDGED, NOT_METRICS, differing, read_json, read_metrics, run_names

__all__ = ['Result', 'compare', 'main', 'read_result']

# what a config.py says of one run, and all seeds of it have in common without
OF_A_RUN = re.compile(r'^(work_dir|randomness|load_from|resume|launcher) *=.*\n(?:[ )\]}].*\n)*|label_seed=\d+',
                      re.MULTILINE)


class Result(NamedTuple):
    """What a run came to.

    Attributes:
        name: of the run. seed: ``None`` where it is not known. config: its text, equal for all seeds.
        judged: data set, split, points and samples, where they are known.
        numbers: of the last epoch, or of the test where there was one.
    """
    name: str
    seed: int | None
    config: str
    judged: Mapping
    numbers: Mapping[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d compare RUN_DIR... [--keys ...] [--force]``: print a Markdown table."""
    from ewa3d.cli.options import Parser
    parser = Parser('ewa3d compare', description='Results of runs as a table: mean ± standard deviation over the seeds '
                                                 'of each config, of a test where there was one, else of the last '
                                                 'epoch.')
    parser.add_argument('runs', nargs='+', metavar='RUN_DIR', help='work dirs of train or test')
    parser.add_argument('--keys', nargs='+', metavar='KEY', help='metrics; default: all but those of single classes')
    parser.add_argument('--force', action='store_true', help='also what was judged on different data')
    args = parser.parse_args(argv)
    sys.stdout.write(compare(args.runs, args.keys, args.force) + '\n')
    return 0


def compare(folders: Sequence[str | Path], keys: Sequence[str] | None = None, force: bool = False) -> str:
    """A Markdown table of runs: runs of one config under different seeds are a row, mean ± standard deviation.

    Args:
        folders: work dirs of train or test. keys: metrics, one a column. force: compare what does not compare.

    Raises:
        FileNotFoundError: a folder is of no run. ValueError: runs that were judged on different data, splits or numbers
            of points; a metric that no run has; a damaged file.
    """
    results = [read_result(folder, name) for folder, name in zip(folders, run_names(folders))]
    wrong = differing({result.name: result.judged for result in results})
    if wrong and not force:
        raise ValueError(f'{wrong}: such numbers do not compare; --force puts them into one table')
    known = dict.fromkeys(key for result in results for key in result.numbers if not is_of_one_class(key))
    for key in keys or ():
        if not any(key in result.numbers for result in results):
            raise ValueError(f'no run has {key!r}; {nearest(key, known)}')
    keys = list(keys or known)
    rows: dict[tuple, list[Result]] = {}
    for result in results:
        rows.setdefault((result.config or result.name, *map(str, result.judged.values())), []).append(result)
    head = ['run', 'seeds', *JUDGED[:3], *keys]
    lines = [head, ['---'] * len(head)]
    for row in rows.values():
        seeds = ' '.join(str(result.seed) for result in sorted(row, key=lambda one: one.seed or 0)
                         if result.seed is not None)
        about = [row[0].judged.get(key) for key in JUDGED[:3]]
        lines.append([_common([result.name for result in row]), seeds or f'({len(row)})',
                      *('–' if value is None else str(value) for value in about),
                      *(_told([result.numbers[key] for result in row if key in result.numbers]) for key in keys)])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def read_result(folder: str | Path, name: str | None = None) -> Result:
    """What a work dir says of its run.

    Raises:
        FileNotFoundError: there is nothing of a run in it. ValueError: a damaged file.
    """
    folder = Path(folder)
    tested, environment = read_json(folder / 'metrics.json'), read_json(folder / 'environment.json')
    if tested:
        numbers, judged = tested, {key: tested.get(key) for key in JUDGED}
    else:
        lines = [line for line in read_metrics(folder) if line['mode'] in ('val', 'test')]
        if not lines:
            raise ValueError(f'{folder}: the run was not evaluated; ewa3d test CONFIG CHECKPOINT --work-dir {folder}')
        numbers, judged = lines[-1], environment.get('judged') or {}
    numbers = {key: float(value) for key, value in numbers.items() if isinstance(value, (int, float))
               and not isinstance(value, bool) and key not in (*NOT_METRICS, *JUDGED, 'seed')}
    path = folder / 'config.py'
    config = OF_A_RUN.sub('', path.read_text(encoding='utf-8')) if path.is_file() else _tested_config(tested)
    return Result(name or folder.resolve().name, environment.get('seed', tested.get('seed')), config, judged, numbers)


def _tested_config(tested: Mapping) -> str:
    return ' '.join(str(tested[key]) for key in ('config', 'weights') if tested.get(key))


def _told(values: Sequence[float]) -> str:
    if not values:
        return '–'
    spread = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.fmean(values):.2f}{spread}'


def _common(names: Sequence[str]) -> str:
    """``plain_s*`` for ``plain_s0`` and ``plain_s1``."""
    if len(set(names)) == 1:
        return names[0]
    start = names[0]
    while not all(name.startswith(start) for name in names):
        start = start[:-1]
    return f'{start}*'
