"""The command ``fewshot``: train on every fold, one after the other, and report mean ± std over them."""
import copy
import hashlib
import inspect
import itertools
import json
import statistics
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from mmengine.config import Config

from ewa3d.checks import check_integer
from ewa3d.cli.options import load_config
from ewa3d.datasets.fewshot import FewShot
from ewa3d.engine.derive import dataset_cfgs
from ewa3d.engine.plain import to_plain
from ewa3d.engine.runner import Runner
from ewa3d.engine.validate import check_config
from ewa3d.files import atomic_write, check_writable
from ewa3d.registry import DATASETS

__all__ = ['run_folds', 'summarise']

TASK = {key: inspect.signature(FewShot).parameters[key].default for key in ('way', 'shot')}
NOTE = ('last: accuracy on the queries after the last epoch. best: of the epoch with the highest accuracy, chosen on '
        'those same queries as the published code does: optimistic. std: over folds, with n - 1.')


def command(args) -> int:
    """``ewa3d fewshot``, see ewa3d/cli/fewshot.py."""
    cfg = load_config(args.config, args.cfg_options)
    if args.pretrained is not None:
        cfg.merge_from_dict({'model.pretrained': args.pretrained})
    if args.seed is not None:
        cfg.merge_from_dict({'randomness.seed': args.seed})
    tasks = list(itertools.product(*(dict.fromkeys(values or [None]) for values in (args.way, args.shot))))
    runs = [_of_task(cfg, args, way, shot, alone=len(tasks) == 1) for way, shot in tasks]
    for cfg, work_dir in runs:
        check_writable(work_dir, '--work-dir')
        check_folds(cfg, args.folds)
    for cfg, work_dir in runs:
        report = run_folds(cfg, work_dir, args.folds, args.keep_checkpoints)
        sys.stdout.write(f'{describe(report)}→ {work_dir / "fewshot.json"}\n')
    return 0


def _of_task(cfg: Config, args, way: int | None, shot: int | None, alone: bool) -> tuple[Config, Path]:
    """The config of one of the command's tasks, and its folder: ``--work-dir`` itself where it is the only one."""
    cfg = copy.deepcopy(cfg)
    task = '{way}way_{shot}shot'.format(**set_fold(cfg, 0, way=way, shot=shot))
    if args.work_dir is None:
        return cfg, Path('work_dirs') / f'{Path(args.config).stem}_{task}'
    return cfg, Path(args.work_dir) if alone else Path(args.work_dir) / task


def run_folds(cfg: Config, work_dir: str | Path, folds: int = 10, keep_checkpoints: bool = False) -> dict:
    """Train and evaluate folds 0 to ``folds`` − 1 of a config whose data are :class:`~ewa3d.datasets.FewShot`.

    ``work_dir/fewshot.json`` holds the results; folds that it has are skipped, and one that was interrupted continues
    from its last checkpoint. Each fold's own files are in ``work_dir/fold_N``; its checkpoints are deleted when it is
    done.

    Args:
        keep_checkpoints: leave them there.

    Returns:
        what ``fewshot.json`` holds: ``folds``, a list with each one's accuracies in percent, ``last`` and ``best`` with
        ``best_epoch``, and of all ``last`` and ``best`` with ``mean`` and ``std``.

    Raises:
        FileNotFoundError: the files of one of the folds are not there; before the first is trained on.
        ValueError: no few-shot data in the config, or results of another config in ``work_dir``.
    """
    check_integer('folds', folds, 1)
    cfg, work_dir = copy.deepcopy(cfg), Path(work_dir)
    cfg.randomness = {**(cfg.get('randomness') or {}), 'seed': (cfg.get('randomness') or {}).get('seed') or 0}
    task = set_fold(cfg, 0)
    check_config(cfg)
    check_folds(cfg, folds)
    report = read_report(work_dir, dict(**task, seed=cfg.randomness.seed, digest=digest(cfg)))
    report['config'] = str(cfg.filename)
    started, done = time.perf_counter(), 0
    for fold in range(folds):
        if any(result['fold'] == fold for result in report['folds']):
            continue
        result = run_fold(cfg, work_dir / f'fold_{fold}', fold)
        report['folds'] = sorted([*report['folds'], result], key=lambda r: r['fold'])
        write_report(work_dir, report)
        if not keep_checkpoints:
            remove_checkpoints(work_dir / f'fold_{fold}')
        done += 1
        left = folds - sum(r['fold'] < folds for r in report['folds'])
        seconds = (time.perf_counter() - started) / done
        sys.stdout.write(f'fold {fold}: last {result["last"]:.2f}  best {result["best"]:.2f} (epoch '
                         f'{result["best_epoch"]})  {result["seconds"]:.0f} s; {folds - left}/{folds} folds, '
                         f'{timedelta(seconds=round(left * seconds))} left\n')
        sys.stdout.flush()
    return report


def run_fold(cfg: Config, work_dir: Path, fold: int) -> dict:
    """Train on one fold; its accuracies."""
    cfg = copy.deepcopy(cfg)
    set_fold(cfg, fold)
    cfg.work_dir, cfg.resume = str(work_dir), True
    started = time.perf_counter()
    Runner.from_cfg(cfg).train()
    accuracies = read_accuracies(work_dir / 'metrics.jsonl')
    best_epoch = max(accuracies, key=accuracies.get)  # the first of equals
    return dict(fold=fold, last=accuracies[max(accuracies)], best=accuracies[best_epoch], best_epoch=best_epoch,
                epochs=max(accuracies), evaluations=len(accuracies), seconds=round(time.perf_counter() - started, 1))


def set_fold(cfg: Config, fold: int, **task: int | None) -> dict[str, int]:
    """Put the fold, and ``way`` and ``shot`` where given, into every few-shot data set of ``cfg``.

    Returns:
        ``way`` and ``shot``.

    Raises:
        ValueError: the training data, or what is evaluated, are no few-shot data, or folds of another task.
    """
    found = fewshot_cfgs(cfg)
    if not found['train'] or not (found['val'] or found['test']):
        raise ValueError('fewshot needs a config with FewShot data in train_dataloader and in val_dataloader or '
                         'test_dataloader; configs/_base_/datasets/fewshot-modelnet40.py shows them')
    tasks = []
    for dataset in (c for members in found.values() for c in members):
        dataset.update(fold=fold, **{key: value for key, value in task.items() if value is not None})
        tasks.append({key: dataset.get(key, default) for key, default in TASK.items()})
    if any(other != tasks[0] for other in tasks):
        raise ValueError(f'the data sets of the config are folds of different tasks: {tasks}')
    return tasks[0]


def check_folds(cfg: Config, folds: int) -> None:
    """Raise ``FileNotFoundError`` where a fold is missing: now, and not when its turn comes."""
    for dataset in itertools.chain(*fewshot_cfgs(cfg).values()):
        for fold in range(folds):
            DATASETS.build({**dataset, 'fold': fold, 'pipeline': [], 'lazy_init': True})


def fewshot_cfgs(cfg: Config) -> dict[str, list[Mapping]]:
    """The configs of few-shot data, by split."""
    return {split: [c for c in dataset_cfgs(cfg.get(f'{split}_dataloader')) if is_fewshot(c)]
            for split in ('train', 'val', 'test')}


def is_fewshot(cfg: Mapping) -> bool:
    cls = DATASETS.get(cfg['type']) if isinstance(cfg['type'], str) else cfg['type']
    return isinstance(cls, type) and issubclass(cls, FewShot)


def read_accuracies(path: Path) -> dict[int, float]:
    """Epoch → ``OA`` of a run's evaluations."""
    accuracies = {}
    for text in path.read_text(encoding='utf-8').splitlines():
        line = json.loads(text)
        if line['mode'] != 'train':
            if 'OA' not in line:
                raise KeyError(f"{path}: a fold is reported by 'OA'; its evaluator gives {sorted(line)}")
            accuracies[line['epoch']] = line['OA']
    return accuracies


def summarise(results: list[dict]) -> dict[str, dict]:
    """``mean`` and ``std`` (with n − 1; ``None`` for one fold) over folds, of ``last`` and of ``best``."""
    summary = {}
    for key in ('last', 'best'):
        values = [result[key] for result in results]
        summary[key] = dict(mean=statistics.mean(values), std=statistics.stdev(values) if len(values) > 1 else None)
    return summary


# ---- the report ------------------------------------------------------------------------------------------------------
def digest(cfg: Config) -> str:
    """A hash of everything that a result depends on; the number of the fold is set to 0 before."""
    content = {k: v for k, v in cfg.to_dict().items() if k not in ('work_dir', 'resume', 'launcher')}
    return hashlib.sha256(json.dumps(to_plain(content, 'config'), sort_keys=True).encode()).hexdigest()[:12]


def read_report(work_dir: Path, settings: dict) -> dict:
    """The report in ``work_dir``, begun where there is none.

    Raises:
        ValueError: it is unreadable, or was made with other settings, or is missing beside folds that were begun.
    """
    path = work_dir / 'fewshot.json'
    begun = list(work_dir.glob('fold_*/last_checkpoint'))
    if path.is_file():
        try:
            report = json.loads(path.read_text(encoding='utf-8'))
            found, _ = report['settings'], [(r['fold'], r['last'] + r['best']) for r in report['folds']]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is no report of few-shot folds ({error!r}); move it away') from None
        if found == settings:
            return report
        if report['folds'] or begun:  # else a start that came to nothing
            raise ValueError(f'{path} holds folds of other settings: {found} there, {settings} here (the digest is of '
                             f'the whole config); choose another --work-dir, or remove it')
    elif begun:
        raise ValueError(f'{begun[0].parent} is a fold that was begun, and there is no {path} that says with which '
                         f'settings; choose another --work-dir, or remove it')
    report = dict(settings=settings, note=NOTE, folds=[])
    write_report(work_dir, report)
    return report


def write_report(work_dir: Path, report: dict) -> None:
    if report['folds']:
        report.update(summarise(report['folds']))
    atomic_write(work_dir / 'fewshot.json', json.dumps(report, indent=2) + '\n')


def remove_checkpoints(folder: Path) -> None:
    for path in [*folder.glob('*.pth'), folder / 'last_checkpoint']:
        path.unlink(missing_ok=True)


def describe(report: dict) -> str:
    """The result in two lines."""
    n, settings = len(report['folds']), report['settings']
    last, best = (f'{report[key]["mean"]:.2f}' + (f' ± {report[key]["std"]:.2f}' if n > 1 else '')
                  for key in ('last', 'best'))
    return (f'{settings["way"]}-way {settings["shot"]}-shot, {n} fold{"s" * (n > 1)}, last epoch: {last}\n'
            f'best epoch of each fold, chosen on its own queries (optimistic; what published tables have): {best}\n')
