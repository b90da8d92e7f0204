"""The main job on data that needs no download: train plain and with EWA, evaluate, fuse, evaluate again, compare.

``python -m ewa3d.quickstart`` or :func:`main`. Training, evaluation and fusing go through the code that the commands
use; what is here is the order of the steps, a progress line, the table and the pictures.
"""
import argparse
import contextlib
import io
import json
import logging
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from ewa3d import visualization
from ewa3d.bench import Case, Settings, measure
from ewa3d.cli import USER_ERRORS, load_config, one_line
from ewa3d.cli.options import Parser
from ewa3d.config_files import config_root
from ewa3d.engine.checkpoint import find_last_checkpoint
from ewa3d.engine.runner import Runner
from ewa3d.files import atomic_write
from ewa3d.fusing import fuse_checkpoint

__all__ = ['main']

NAMES = ('plain', 'ewa')
MARKER = '.ewa3d-quickstart'  # a folder with this file in it was made here and may be replaced
PRODUCTS = ('results.json', 'results.md', 'predictions.png', 'curves.png', 'confusion.png')
CLOUDS_SHOWN = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart, see ``--help``; returns the exit code: 0, or 2 for a mistake in the input."""
    args = _arguments(argv)
    threads = torch.get_num_threads()
    try:
        return run(args)
    except USER_ERRORS as error:
        if args.debug:
            raise
        sys.stderr.write(f'error: {one_line(error)}\n')
        return 2
    finally:
        torch.set_num_threads(threads)


def run(args: argparse.Namespace) -> int:
    """The quickstart behind :func:`main`.

    Raises:
        FileNotFoundError: no such configs.
        FileExistsError: the work dir holds something else.
    """
    started = time.perf_counter()
    configs, work_dir = _configs(args.configs), claim(args.work_dir)
    torch.set_num_threads(args.threads)
    say(f'ewa3d quickstart: trains two small point transformers on embedded shapes, one plain and one with EWA '
        f'experts,\nevaluates both, fuses the experts away, evaluates again and compares. At most 5 minutes on 2 CPU '
        f'cores.\nCompute threads: {args.threads}; seed: {args.seed}; everything goes to {work_dir}\n')
    results = experiment(configs, work_dir, args.seed, args.threads)
    atomic_write(work_dir / 'results.json', json.dumps(results, indent=1) + '\n')
    atomic_write(work_dir / 'results.md', table(results) + '\n')
    say(f'\n{table(results)}\n\nDone in {_clock(time.perf_counter() - started)}. Files:')
    for name in PRODUCTS:
        say(f'  {work_dir / name}')
    return 0


def experiment(configs: dict[str, Path], work_dir: Path, seed: int = 0, threads: int = 1) -> dict:
    """Train, evaluate, fuse, evaluate, time, draw; the numbers of the table.

    Args:
        configs: ``{'plain': path, 'ewa': path}``.
    """
    checkpoints = {}
    for number, name in enumerate(NAMES, 1):
        checkpoints[name] = train(_config(configs[name], work_dir / name, seed), f'[{number}/2 {name}]')
    checkpoints['fused'] = work_dir / 'ewa' / 'fused.pth'
    report = fuse_checkpoint(checkpoints['ewa'], checkpoints['fused'])
    if not report.written:
        raise ValueError(f'fusing {checkpoints["ewa"]} changed the model:\n{report}')
    say('evaluating: plain, EWA, EWA fused …')
    judged = {}
    for name, checkpoint in checkpoints.items():  # the fused checkpoint is a plain one: the plain config reads it
        config = configs['ewa' if name == 'ewa' else 'plain']
        judged[name] = evaluate(_config(config, work_dir / 'eval' / name, seed), checkpoint)
    milliseconds = latency({name: (run['model'], run['batch']) for name, run in judged.items()}, threads)
    difference = float((judged['ewa']['logits'] - judged['fused']['logits']).abs().max())
    trained = {name: judged['ewa' if name == 'fused' else name]['parameters'] for name in judged}
    rows = [dict(model=label, OA=judged[name]['metrics']['OA'], mAcc=judged[name]['metrics']['mAcc'],
                 parameters_training=trained[name], parameters_deployed=judged[name]['parameters'],
                 ms_per_batch=milliseconds[name], max_output_difference=difference if name == 'fused' else None)
            for name, label in (('plain', 'plain'), ('ewa', 'EWA (expanded)'), ('fused', 'EWA fused'))]
    draw(judged['fused'], work_dir)
    return dict(format=1, seed=seed, threads=threads, test_clouds=len(judged['plain']['labels']),
                classes=len(judged['plain']['meta']['classes']),
                batch_size=len(judged['plain']['batch']['inputs']['points']), rows=rows,
                configs={name: str(path) for name, path in configs.items()},
                checkpoints={name: str(path) for name, path in checkpoints.items()})


def train(cfg: Config, label: str) -> Path:
    """Train one config, with a progress line; returns the last checkpoint."""
    runner = _runner(cfg)
    runner.register_hook(_Progress(label), priority='VERY_LOW')
    runner.train()
    return find_last_checkpoint(runner.work_dir)


def evaluate(cfg: Config, checkpoint: Path) -> dict:
    """Test ``checkpoint`` under ``cfg``: the metrics the test command prints, and the outputs for all test clouds."""
    cfg.load_from = str(checkpoint)
    runner = _runner(cfg)
    metrics = runner.test()
    model, loader = runner.model.eval(), runner.test_dataloader
    logits, labels, batches = [], [], []
    with torch.no_grad():
        for data in loader:
            batch = model.data_preprocessor(data, False)
            logits.append(model(**batch, mode='tensor'))
            labels += [int(sample.gt_label) for sample in batch['data_samples']]
            batches.append(batch)
    points = [cloud for batch in batches for cloud in batch['inputs']['points']]
    return dict(metrics=metrics, model=model, batch=batches[0], points=points, logits=torch.cat(logits), labels=labels,
                meta=loader.dataset.metainfo, parameters=sum(p.numel() for p in model.parameters()))


def latency(models: dict, threads: int) -> dict[str, float]:
    """Milliseconds per batch by model, median of rounds in which the models take turns: name → (model, batch)."""
    def forward(model, batch):
        def call():
            with torch.inference_mode():
                model(**batch, mode='tensor')
        return lambda: call

    case = Case('inference', {name: forward(*pair) for name, pair in models.items()})
    rows = measure(case, Settings(threads=threads, repeat=21))
    return {row.variant: row.summary()['median_s'] * 1e3 for row in rows}


def draw(run: dict, work_dir: Path) -> None:
    """The pictures: test clouds with predictions, training curves, the confusion matrix of the fused model."""
    classes, labels = run['meta']['classes'], torch.tensor(run['labels'])
    predicted = run['logits'].argmax(1)
    right = predicted == labels
    shown = [int((labels == c).nonzero()[0]) for c in range(len(classes)) if (labels == c).any()]
    shown += [i for i in (~right).nonzero().flatten().tolist() if i not in shown]
    shown = shown[:CLOUDS_SHOWN]
    visualization.draw_predictions(
        [run['points'][i] for i in shown], labels[shown], predicted[shown], classes, work_dir / 'predictions.png',
        columns=min(8, max(1, -(-len(shown) // 2))), up=run['meta'].get('up_axis', 'z'), size=1.9,
        heading=f'EWA fused: {int(right.sum())} of {len(labels)} test clouds right. '
                f'One cloud of each class, then wrong ones')
    counts = torch.zeros(len(classes), len(classes), dtype=torch.long)
    counts.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    visualization.draw_confusion(counts, classes, work_dir / 'confusion.png', heading='EWA fused')
    panels = {'training loss': ('train', 'loss'), 'OA on the test split, %': ('val', 'OA')}
    curves = {}
    for title, source in panels.items():
        lines = {label: _curve(work_dir / name / 'metrics.jsonl', *source)
                 for name, label in (('plain', 'plain'), ('ewa', 'EWA'))}
        if all(epochs for epochs, _ in lines.values()):
            curves[title] = lines
    visualization.draw_curves(curves, work_dir / 'curves.png', heading='Training')


def table(results: dict) -> str:
    """The results as a table in Markdown, aligned for the eye as well."""
    cells = [('model', 'OA %', 'mAcc %', 'parameters in training', 'deployed', f'ms / {results["batch_size"]} clouds',
              'max output difference')]
    for row in results['rows']:
        gap = row['max_output_difference']
        cells.append((row['model'], f'{row["OA"]:.2f}', f'{row["mAcc"]:.2f}', f'{row["parameters_training"]:,}',
                      f'{row["parameters_deployed"]:,}', f'{row["ms_per_batch"]:.1f}',
                      '' if gap is None else f'{gap:.1e}' if gap else '0'))
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, tuple('-' * (width - (i > 0)) + ':' * (i > 0) for i, width in enumerate(widths)))
    return '\n'.join('| ' + ' | '.join(text.ljust(width) if i == 0 else text.rjust(width)
                                       for i, (text, width) in enumerate(zip(line, widths))) + ' |' for line in cells)


def claim(path) -> Path:
    """Make ``path`` the quickstart's folder: what an earlier quickstart left there goes, anything else is an error."""
    folder = Path(path).expanduser().resolve()
    if folder.is_file():
        raise FileExistsError(f'{folder} is a file; expected a folder for --work-dir')
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise FileExistsError(f'{folder} holds files that the quickstart did not make; choose another --work-dir')
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()
    for name in (*NAMES, 'eval'):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in PRODUCTS:
        (folder / name).unlink(missing_ok=True)
    return folder


class _Progress(Hook):
    """One line that tells epoch, loss, accuracy and the time left; on a terminal it is rewritten in place."""

    def __init__(self, label: str):
        self.label, self.loss, self.accuracy = label, float('nan'), ''
        self.started = self.shown = 0.

    def before_train(self, runner) -> None:
        self.started = time.perf_counter()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        loss = float(outputs['loss'].detach())
        self.loss = loss if self.loss != self.loss else 0.95 * self.loss + 0.05 * loss
        now, done = time.perf_counter(), runner.iter + 1
        interval = 0.2 if sys.stdout.isatty() else 20.
        if now - self.shown < interval and done < runner.max_iters:
            return
        self.shown = now
        left = (now - self.started) / done * (runner.max_iters - done)
        filled = 24 * done // runner.max_iters
        self._line(f'{self.label} {"━" * filled}{"·" * (24 - filled)} epoch {runner.epoch + 1}/{runner.max_epochs}  '
                   f'loss {self.loss:.3f}{self.accuracy}  {_clock(left)} left')

    def after_val_epoch(self, runner, metrics=None) -> None:
        self.accuracy = f'  OA {(metrics or {}).get("OA", float("nan")):.1f} %'

    def after_train(self, runner) -> None:
        self._line(f'{self.label} trained for {runner.max_epochs} epochs in '
                   f'{_clock(time.perf_counter() - self.started)}: loss {self.loss:.3f}{self.accuracy}', end='\n')

    @staticmethod
    def _line(text: str, end: str = '') -> None:
        if sys.stdout.isatty():
            sys.stdout.write(f'\r{text}\x1b[K{end}')
            sys.stdout.flush()
        else:
            say(text)


def say(text: str) -> None:
    """Write a line to the console at once."""
    sys.stdout.write(text + '\n')
    sys.stdout.flush()


def _arguments(argv) -> argparse.Namespace:
    parser = Parser('ewa3d quickstart', description=__doc__.partition('\n')[0])
    parser.add_argument('--work-dir', default='work_dirs/quickstart', help='a folder of its own (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='the same seed, the same numbers (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=1, help='compute threads (default: %(default)s)')
    parser.add_argument('--configs', nargs=2, metavar=('PLAIN', 'EWA'),
                        help='default: quickstart/plain and quickstart/ewa')
    args = parser.parse_args(argv)
    if args.threads < 1 or args.seed < 0:
        parser.error(f'--threads {args.threads} --seed {args.seed}: expected at least 1 thread and a seed from 0 on')
    return args


def _configs(given: Sequence[str] | None) -> dict[str, Path]:
    """The two config files, found from any folder."""
    if not given:
        return {name: config_root() / 'quickstart' / f'{name}.py' for name in NAMES}
    paths = [Path(path).resolve() for path in given]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f'no config {path}; --configs takes the files PLAIN and EWA')
    return dict(zip(NAMES, paths))


def _config(path: Path, work_dir: Path, seed: int) -> Config:
    cfg = load_config(str(path))
    cfg.work_dir = str(work_dir)
    cfg.randomness = dict(seed=seed)
    return cfg


def _runner(cfg: Config) -> Runner:
    """A Runner whose log goes to its work dir; only warnings reach the console."""
    with contextlib.redirect_stdout(io.StringIO()):  # the log starts while the runner is being built
        runner = Runner.from_cfg(cfg)
    for handler in runner.logger.handlers:
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            handler.setStream(sys.stdout)
            handler.setLevel(logging.WARNING)
    return runner


def _curve(path: Path, mode: str, key: str) -> tuple[list, list]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if line['mode'] == mode and key in line]
    return [line['epoch'] for line in lines], [line[key] for line in lines]


def _clock(seconds: float) -> str:
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d}'


if __name__ == '__main__':
    raise SystemExit(main())
