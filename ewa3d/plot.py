"""``plot RUN_DIR...``: curves of several runs over one another, the matrix of confusions; PNG, SVG, PDF or a page."""
import html
import sys
from collections.abc import Sequence
from pathlib import Path

from ewa3d.charts import confusion_table, line_charts, page
from ewa3d.files import atomic_write
from ewa3d.runs import curves_of, differing, read_json, read_metrics, run_names

__all__ = ['main', 'plot_confusion', 'plot_runs']

SUFFIXES = ('.png', '.svg', '.pdf', '.html')


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d plot RUN_DIR... [--keys ...] [--out FILE] [--confusion]``: draw and tell where."""
    from ewa3d.cli.options import Parser
    parser = Parser('ewa3d plot', description='Curves of runs over one another; the confusion matrix of one.')
    parser.add_argument('runs', nargs='+', metavar='RUN_DIR', help='work dirs of train')
    parser.add_argument('--keys', nargs='+', metavar='KEY',
                        help="what to show: names in metrics.jsonl or patterns, loss OA 'acc/*' 'spread/*'; by default "
                             'the loss, the metrics, learning rate, share rate and the spread of the experts')
    parser.add_argument('--out', type=Path, metavar='FILE',
                        help='*.png, *.svg, *.pdf or *.html (default: curves.png, or confusion.png)')
    parser.add_argument('--confusion', action='store_true', help='the confusion matrix of one run instead of curves')
    args = parser.parse_args(argv)
    if args.confusion:
        if len(args.runs) != 1 or args.keys:
            raise ValueError('--confusion draws one run, without --keys')
        written = plot_confusion(args.runs[0], args.out or Path('confusion.png'))
    else:
        written = [plot_runs(args.runs, args.out or Path('curves.png'), args.keys)]
        wrong = differing({name: read_json(Path(folder) / 'environment.json').get('judged') or {}
                           for name, folder in zip(run_names(args.runs), args.runs)})
        sys.stderr.write(f'warning: {wrong}: their metrics do not compare\n' if wrong else '')
    sys.stdout.writelines(f'{path}\n' for path in written)
    return 0


def plot_runs(folders: Sequence[str | Path], out: str | Path, keys: Sequence[str] | None = None) -> Path:
    """Curves of runs over one another, a panel for each of ``keys`` (see :func:`ewa3d.runs.curves_of`).

    Raises:
        FileNotFoundError, ValueError: a folder is of no run, no run has a key, or another suffix.
    """
    _check_suffix(out)
    runs = {name: read_metrics(folder) for name, folder in zip(run_names(folders), folders)}
    panels, out = curves_of(runs, keys), Path(out)
    if not panels:
        raise ValueError(f'{", ".join(runs)}: nothing to plot by default; name what with --keys')
    heading = ', '.join(runs)
    if out.suffix.lower() == '.html':
        return atomic_write(out, page(heading, f'<h1>{html.escape(heading)}</h1>{line_charts(panels)}'))
    from ewa3d.visualization import draw_curves
    return draw_curves(panels, out, heading=heading if len(runs) == 1 else '')


def plot_confusion(folder: str | Path, out: str | Path) -> list[Path]:
    """The confusion matrix of the last evaluation in a work dir; one file a task, where there are several.

    Raises:
        FileNotFoundError: there is none. ValueError: a damaged file, or another suffix.
    """
    _check_suffix(out)
    folder, out = Path(folder), Path(out)
    found = read_json(folder / 'confusion.json')
    if not found:
        raise FileNotFoundError(f'{folder} has no confusion.json; train and test write it where the metric is Accuracy')
    if out.suffix.lower() == '.html':
        parts = [f'<h2>{html.escape(task)}</h2>{confusion_table(entry["counts"], entry["classes"])}'
                 for task, entry in found.items()]
        return [atomic_write(out, page(folder.resolve().name, '\n'.join(parts)))]
    from ewa3d.visualization import draw_confusion
    return [draw_confusion(entry['counts'], entry['classes'], out.with_stem(f'{out.stem}_{task}') if task else out,
                           heading=task) for task, entry in found.items()]


def _check_suffix(out: str | Path) -> None:
    if Path(out).suffix.lower() not in SUFFIXES:
        raise ValueError(f'{out}: expected a file name that ends in {", ".join(SUFFIXES)}')
