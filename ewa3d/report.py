"""One page about a run: what came out, its curves, what is confused with what, pictures, how to repeat it.

The page is made of what lies in the work dir, has everything in it, loads nothing and needs no script.
"""
import base64
import html
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from ewa3d.charts import confusion_table, line_charts, page, table
from ewa3d.evaluation import is_of_one_class
from ewa3d.files import atomic_write
from ewa3d.runs import NOT_METRICS, curves_of, read_json, read_metrics

__all__ = ['main', 'write_report']

PICTURE_BYTES = 12_000_000  # of all pictures in a page, the newest first
MAX_PICTURES = 8


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d report RUN_DIR...``: write the report of each run anew."""
    from ewa3d.cli.options import Parser
    parser = Parser('ewa3d report', description='Write report.html of runs anew.')
    parser.add_argument('runs', nargs='+', metavar='RUN_DIR', help='work dirs of train or test')
    for folder in parser.parse_args(argv).runs:
        sys.stdout.write(f'{write_report(folder)}\n')
    return 0


def write_report(folder: str | Path, *, config: str | None = None, environment: Mapping | None = None,
                 tested: Mapping | None = None) -> Path:
    """``report.html`` in a work dir: results, curves, confusion matrix, pictures, command, config, environment.

    Sections of which there is nothing are left out.

    Args:
        folder: the work dir of a training or a test.
        config, environment, tested: the text of the config, the environment and the results of a test; by default
            ``config.py``, ``environment.json`` and ``metrics.json``.

    Raises:
        FileNotFoundError: ``folder`` is not there, or nothing in it is of a run. ValueError: a file that is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: the work dir of a run was expected, and there is no such folder')
    has_lines = (folder / 'metrics.jsonl').is_file()
    lines = read_metrics(folder) if has_lines and (folder / 'metrics.jsonl').stat().st_size else []
    tested = dict(read_json(folder / 'metrics.json') if tested is None else tested)
    environment = dict(read_json(folder / 'environment.json') if environment is None else environment)
    if config is None and (folder / 'config.py').is_file():
        config = (folder / 'config.py').read_text(encoding='utf-8', errors='replace')
    if not lines and not tested:
        raise FileNotFoundError(f'{folder}: neither metrics.jsonl of a training nor metrics.json of a test is there')
    name = folder.resolve().name
    sections = [('Results', _results(lines, tested, folder)), ('To repeat it', _command(environment, tested, folder)),
                ('Curves', line_charts(curves_of({name: lines})) if _drawable(lines) else ''),
                ('Confusion', _confusions(read_json(folder / 'confusion.json'))),
                ('Pictures', _pictures(folder / 'pictures')), ('Config', _folded('config.py', config)),
                ('Environment', _environment(environment))]
    body = [f'<h1>{html.escape(name)}</h1><p class="muted">{html.escape(_subtitle(lines, tested, environment))}</p>']
    body += [f'<h2>{title}</h2>\n{content}' for title, content in sections if content]
    return atomic_write(folder / 'report.html', page(name, '\n'.join(body)))


def _drawable(lines: Sequence[Mapping]) -> bool:
    return any(line['mode'] == 'train' and 'loss' in line for line in lines) or \
        any(line['mode'] == 'val' for line in lines)


def _subtitle(lines: Sequence[Mapping], tested: Mapping, environment: Mapping) -> str:
    parts = [environment.get('started', '')]
    seconds = sum(line.get('time', 0) for line in lines)
    if lines:
        parts += [f'{max(line["epoch"] for line in lines)} epochs', f'{timedelta(seconds=round(seconds))} of work']
    parts += [f'seed {environment["seed"]}' if 'seed' in environment else '', environment.get('device', '')]
    if tested.get('checkpoint'):
        parts.append(f'tested: {tested["checkpoint"]}')
    return ' · '.join(part for part in map(str, parts) if part)


def _numbers(line: Mapping) -> dict[str, float]:
    return {key: float(value) for key, value in line.items()
            if key not in NOT_METRICS and isinstance(value, (int, float)) and not isinstance(value, bool)}


def _results(lines: Sequence[Mapping], tested: Mapping, folder: Path) -> str:
    """The last evaluation and the range over the epochs; a test beside them; classes folded away."""
    judged = [line for line in lines if line['mode'] == 'val']
    final = [line for line in lines if line['mode'] == 'test']
    judged, what = (judged, 'validation') if judged else (final[-1:], 'test')
    last = _numbers(judged[-1]) if judged else {}
    found = {key: value for key, value in _numbers(tested).items() if key not in ('points', 'samples', 'seed')}
    parts = []
    for of_classes in (False, True):
        keys = [key for key in dict.fromkeys([*found, *last]) if is_of_one_class(key) == of_classes]
        rows = []
        for key in keys:
            values = [(line[key], line['epoch']) for line in judged if key in line]
            low, high = (min(values), max(values)) if values else ((None, None),) * 2
            rows.append([key, found.get(key)][:1 + bool(found)] + ([last.get(key), *low, *high] if last else []))
        head = ['', 'test'][:1 + bool(found)] + ([f'{what}, epoch {judged[-1]["epoch"]}', 'lowest', 'epoch', 'highest',
                                                  'epoch'] if last else [])
        if rows:
            made = table(rows, head)
            parts.append(f'<details><summary>By class</summary>{made}</details>' if of_classes else made)
    trained = next((line for line in reversed(lines) if line['mode'] == 'train'), None)
    if not parts and trained:
        parts.append(table(sorted(_numbers(trained).items()), ('', f'training, epoch {trained["epoch"]}')))
    about = [f'{key}: {tested[key]}' for key in ('dataset', 'split', 'points', 'samples', 'weights', 'checkpoint')
             if tested.get(key) is not None]
    parts += [f'<p class="muted">The test: {html.escape(", ".join(about))}</p>'] if about else []
    kept = sorted(path.name for path in folder.glob('*.pth'))
    parts += [f'<p class="muted">Checkpoints: {html.escape(", ".join(kept))}</p>'] if kept else []
    return '\n'.join(parts)


def _command(environment: Mapping, tested: Mapping, folder: Path) -> str:
    commands = [list(map(str, entry['command'])) for entry in (environment, tested) if entry.get('command')]
    lines = [shlex.join(['python'] * command[0].endswith('.py') + command)
             for i, command in enumerate(commands) if command not in commands[:i]]
    if not lines:
        return ''
    if (folder / 'config.py').is_file():
        seed = f' --seed {environment["seed"]}' if 'seed' in environment else ''
        lines += ['', '# or, from the resolved config alone:',
                  f'ewa3d train {shlex.quote(str(folder / "config.py"))}{seed} --work-dir NEW_FOLDER']
    return f'<pre>{html.escape(chr(10).join(lines))}</pre>'


def _confusions(found: Mapping) -> str:
    """By task, where there are several."""
    parts = []
    for task, entry in found.items():
        heading = f'<h3>{html.escape(task)}</h3>' if task else ''
        parts.append(heading + confusion_table(entry['counts'], entry['classes']))
    return '\n'.join(parts)


def _pictures(folder: Path) -> str:
    paths = sorted(folder.glob('*.png'), key=lambda path: (-path.stat().st_mtime, path.name)) if folder.is_dir() else []
    parts, room = [], PICTURE_BYTES
    for path in paths[:MAX_PICTURES]:
        content = path.read_bytes()
        room -= len(content)
        if room < 0:
            break
        parts.append(f'<figure><figcaption>{html.escape(path.name)}</figcaption><img alt="{html.escape(path.name)}" '
                     f'src="data:image/png;base64,{base64.b64encode(content).decode("ascii")}"></figure>')
    left = len(paths) - len(parts)
    return '\n'.join(parts) + (f'<p class="muted">{left} more in {html.escape(folder.name)}/</p>' if left else '')


def _folded(title: str, text: str | None) -> str:
    return f'<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>' if text else ''


def _environment(environment: Mapping) -> str:
    rows = [(key, value) for key, value in environment.items() if not isinstance(value, (Mapping, list))
            and value is not None]
    rows += [(f'version of {key}', value) for key, value in (environment.get('versions') or {}).items()]
    return f'<details><summary>Versions and hardware</summary>{table(rows)}</details>' if rows else ''
