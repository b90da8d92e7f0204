"""The commands ``train``, ``test``, ``fewshot``, ``fuse``, ``convert`` and ``quickstart``.

``tools/*.py`` and the console script ``ewa3d`` call :func:`main`.
"""
import argparse
import contextlib
import json
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config, DictAction

__all__ = ['main', 'train', 'test', 'fewshot', 'fuse', 'convert', 'load_config']

PICTURES = {'PartIoU': 'PartPicturesHook', 'BoxAP': 'BoxPicturesHook'}  # what draws what a metric judges
EVALUATING = ('LoggerHook', 'LinearSVMHook', 'VotingHook', *PICTURES.values())  # hooks that a test keeps
USER_ERRORS = (ValueError, TypeError, KeyError, OSError, ImportError, SyntaxError, NotImplementedError)
CONFIG_SUFFIXES = ('.py', '.yml', '.yaml', '.json')


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code.

    0: done. 1: ``fuse`` or ``convert`` refuses to write. 2: bad input, told in one line. 3: anything else, with its
    traceback. 130: interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['quickstart']:
        from ewa3d.quickstart import main as quickstart
        return quickstart(argv[1:])
    try:
        args = _parser().parse_args(argv)
        return args.command(args)
    except USER_ERRORS as error:
        if '--debug' in argv:
            raise
        sys.stderr.write(f'error: {one_line(error)}\n')
        return 2
    except Exception:
        traceback.print_exc()
        return 3
    except KeyboardInterrupt:
        sys.stderr.write('interrupted; train --resume (or fewshot again) continues from the last checkpoint\n')
        return 130


def one_line(error: BaseException) -> str:
    """What went wrong, without a traceback (a data worker's error carries one in its text)."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if any('Original Traceback' in line for line in lines):
        return lines[-1]
    return ' '.join(lines)


class _Options(DictAction):
    """mmengine's ``k=v`` options, with errors that name the option."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for text in values:
            if not text.partition('=')[0] or '=' not in text:
                raise ValueError(f'{option_string} {text}: key=value was expected')
            try:
                self._parse_iterable(text.partition('=')[2])
            except (AssertionError, ValueError, IndexError):
                raise ValueError(f'{option_string} {text}: the brackets or quotes of the value do not match') from None
            except RecursionError:  # mmengine's parser, on 'dict(a=1)'
                raise ValueError(f'{option_string} {text}: values are words, numbers, [lists] and (tuples); entries of '
                                 f'a dict are set one by one: key.entry=value') from None
        super().__call__(parser, namespace, values, option_string)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser('ewa3d', description='Train, evaluate and fuse point transformers.')
    commands = parser.add_subparsers(required=True, metavar='{train,test,fewshot,fuse,convert,quickstart}')

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--debug', action='store_true', help='show the traceback of an error')
    configured = argparse.ArgumentParser(add_help=False, parents=[common])
    configured.add_argument('--work-dir', help='default: work_dirs/<name of the config>')
    configured.add_argument('--cfg-options', nargs='+', action=_Options, default={}, metavar='k=v',
                            help='override parts of the config: train_cfg.max_epochs=30')
    running = argparse.ArgumentParser(add_help=False, parents=[configured])
    running.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none')
    running.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)

    command = commands.add_parser('train', parents=[running], help='train a model')
    command.add_argument('config')
    command.add_argument('--resume', nargs='?', const='auto', metavar='auto|PATH',
                         help='continue from the last checkpoint in the work dir, or from PATH')
    command.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    command.add_argument('--seed', type=int, help="default: the config's, else 0")
    command.add_argument('--print-config', action='store_true', help='print the resolved config and stop')
    command.set_defaults(command=train)

    command = commands.add_parser('test', parents=[running], help='evaluate a checkpoint')
    command.add_argument('config')
    command.add_argument('checkpoint')
    command.add_argument('--weights', choices=['default', 'ema', 'raw'], default='default',
                         help="of a run with EMA; default: the averaged ones, which its 'state_dict' holds")
    command.add_argument('--vote', type=int, nargs='?', const=10, metavar='TIMES',
                         help='report beside the plain numbers those of logits averaged over so many (10) passes, each '
                              "drawn and augmented by the config's vote_pipeline, or else as in training")
    command.add_argument('--pictures', type=int, nargs='?', const=1, metavar='N',
                         help='pictures/parts.png or boxes.png, and .html, in the work dir: the N (1) best, median and '
                              'worst shapes of part segmentation, or scenes of detection')
    command.set_defaults(command=test)

    command = commands.add_parser('fewshot', parents=[configured],
                                  help='train on every fold of a few-shot task; mean and std over folds')
    command.add_argument('config')
    command.add_argument('--way', type=int, nargs='+', help="number of classes; default: the config's. Several ways "
                                                            'and shots are tasks one after the other')
    command.add_argument('--shot', type=int, nargs='+', help="training clouds of each; default: the config's")
    command.add_argument('--folds', type=int, default=10, help='default: 10; those that are done are skipped')
    command.add_argument('--pretrained', metavar='PATH', help='weights to start from: model.pretrained of the config')
    command.add_argument('--seed', type=int, help="of every fold; default: the config's, else 0")
    command.add_argument('--keep-checkpoints', action='store_true', help='they are deleted when a fold is done')
    command.set_defaults(command=fewshot)

    command = commands.add_parser('fuse', parents=[common], help='write the plain weights of a checkpoint')
    command.add_argument('checkpoint')
    command.add_argument('out', help='*.pth or *.safetensors')
    command.add_argument('--config', help='for models of your own: a config you trust, whose custom_imports are run; '
                                          'by default the config comes from the checkpoint, as data')
    command.add_argument('--weights', choices=['default', 'ema', 'raw'], default='default')
    command.set_defaults(command=fuse)

    command = commands.add_parser('convert', parents=[common],
                                  help='official Point-MAE, Point-BERT and 3DETR weights to ours')
    command.add_argument('kind', choices=['point-mae', 'point-bert', 'dvae', '3detr'],
                         help='point-bert takes its dVAE as well')
    command.add_argument('source', metavar='SRC')
    command.add_argument('out', metavar='OUT', help='*.pth or *.safetensors')
    command.add_argument('--to-official', action='store_true', help='the way back; experts are averaged')
    command.add_argument('--weights', choices=['default', 'ema', 'raw'], default='default',
                         help='which ones of a run with EMA go --to-official')
    command.set_defaults(command=convert)

    commands.add_parser('quickstart', help='train plain and with EWA on embedded data, fuse, compare', add_help=False)
    return parser


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config file and apply ``--cfg-options``.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it does not run.
        KeyError, TypeError: an option whose first name is in neither the config nor the Runner's keys, or that leads
            through something that has no such part.
    """
    from ewa3d.engine.validate import TOP_LEVEL
    from ewa3d.registry import nearest
    if not Path(path).is_file():
        raise FileNotFoundError(f'config {path} does not exist')
    if Path(path).suffix not in CONFIG_SUFFIXES:
        raise ValueError(f'config {path}: a config ends in {", ".join(CONFIG_SUFFIXES)}, got {Path(path).suffix!r}')
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'config {path}: one of the files it names in _base_ or reads does not exist: {error}'
                                ) from None
    except (OSError, ImportError, KeyError):
        raise
    except Exception as error:  # a config is a program: whatever it raises is the user's to see, with its file
        raise ValueError(f'config {path}: {type(error).__name__}: {error}') from error
    for key in options or {}:
        first = key.split('.')[0]
        if first not in cfg and first not in TOP_LEVEL:
            raise KeyError(f'--cfg-options {key}: the config has no {first!r}; {nearest(first, {*cfg, *TOP_LEVEL})}')
        _check_option(cfg._cfg_dict, key)
    try:
        cfg.merge_from_dict(options or {})
    except Exception as error:  # two options that do not go together, such as a=1 a.b=2
        raise ValueError(f'--cfg-options {" ".join(options)}: {type(error).__name__}: {error}') from error
    return cfg


def _check_option(node, key: str) -> None:
    """Raise where a dotted key leads through what has no such part; mmengine fails on it, or makes a dict of a list."""
    parts = key.split('.')
    for i, part in enumerate(parts):
        where = '.'.join(parts[:i])
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise KeyError(f'--cfg-options {key}: {where} is a list of {len(node)}; the index of one of them was '
                               f'expected, got {part!r}')
            node = node[int(part)]
        elif isinstance(node, Mapping):
            if node.get(part) is None:
                _check_missing_list(key, i)
            if part not in node:
                return
            node = node[part]
        else:
            raise TypeError(f'--cfg-options {key}: {where} is {node!r}, of which no part {part!r} can be set; give all '
                            f'of {where}, or change it in the config')


def _check_missing_list(key: str, present: int) -> None:
    """Raise where what is missing behind part ``present`` of a dotted key would have to be a list."""
    parts = key.split('.')
    index = next((i for i in range(present + 1, len(parts)) if parts[i].isdigit()), None)
    if index is not None:
        name, rest = '.'.join(parts[:index]), '.'.join(parts[index + 1:])
        named = f', or give the hook a name: default_hooks.NAME.{rest}=…' if name == 'custom_hooks' and rest else ''
        raise KeyError(f'--cfg-options {key}: the config has no list {name} of which an entry could be changed; write '
                       f"{name.replace('.', '=dict(')}=[dict(type='…')]{')' * name.count('.')} into the config{named}")


def _prepare(args) -> Config:
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(args.config).stem)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg


def train(args) -> int:
    """Train a model from a config."""
    from ewa3d.engine.validate import check_config
    cfg = _prepare(args)
    check_config(cfg)
    if args.amp:
        _use_autocast(cfg)
    resumed = _resolve_resume(cfg, args.resume)
    seed = args.seed if args.seed is not None else (cfg.get('randomness') or {}).get('seed')
    if args.seed is None and resumed is not None:
        from ewa3d.engine.checkpoint import read_checkpoint
        seed = (read_checkpoint(resumed).get('meta') or {}).get('seed', seed)  # the run goes on as it began
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=0 if seed is None else seed)

    from ewa3d.engine.derive import fill_num_classes
    from ewa3d.engine.runner import Runner
    if args.print_config:
        with contextlib.suppress(FileNotFoundError):  # a config can be read where its data are not
            fill_num_classes(cfg)
        sys.stdout.write(cfg.pretty_text)
        return 0
    try:
        Runner.from_cfg(cfg).train()
    except Exception:
        _log_failure(cfg.work_dir)
        raise
    finally:
        _leave_group()
    return 0


def _use_autocast(cfg: Config) -> None:
    kind = (cfg.get('optim_wrapper') or {}).get('type', 'OptimWrapper')
    if kind == 'OptimWrapper':
        cfg.merge_from_dict({'optim_wrapper.type': 'AutocastOptimWrapper'})
    elif kind not in ('AutocastOptimWrapper', 'AmpOptimWrapper'):
        raise ValueError(f'--amp replaces OptimWrapper by AutocastOptimWrapper; the config has {kind!r}')


def _resolve_resume(cfg: Config, resume: str | None) -> Path | None:
    """Put ``--resume`` into ``cfg.resume``; returns the checkpoint that will be continued, if there is one."""
    from ewa3d.engine.intact import find_intact_checkpoint
    if resume is not None:
        cfg.resume = True if resume == 'auto' else resume
    if not cfg.get('resume'):
        return None
    if cfg.resume is True:
        return find_intact_checkpoint(cfg.work_dir)
    if not Path(cfg.resume).is_file():
        raise FileNotFoundError(f'--resume {cfg.resume}: there is no such checkpoint')
    return Path(cfg.resume)


def _log_failure(work_dir: str) -> None:
    """A run that fails at night leaves its traceback in the log."""
    log = Path(work_dir) / 'train.log'
    if log.is_file() and os.environ.get('RANK', '0') == '0':
        with open(log, 'a', encoding='utf-8') as file:
            file.write(traceback.format_exc())


def _leave_group() -> None:
    import torch.distributed as dist
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def test(args) -> int:
    """Evaluate a checkpoint; writes ``metrics.json`` into the work dir."""
    cfg = _prepare(args)
    from mmengine.dist import is_main_process

    from ewa3d.engine.checkpoint import load_any, read_checkpoint, select_weights
    from ewa3d.engine.hooks import unwrapped
    from ewa3d.engine.runner import Runner
    from ewa3d.engine.validate import check_config
    from ewa3d.evaluation import is_of_one_class
    from ewa3d.files import atomic_write
    from ewa3d.models.build import without_pretrained
    check_config(cfg, training=False)  # all that it has, before the parts for training are left out
    checkpoint = read_checkpoint(args.checkpoint)
    weights, kind = select_weights(checkpoint, args.weights)
    meta = checkpoint.get('meta') or {}
    keep = {k: v for k, v in (cfg.get('default_hooks') or {}).items() if v and v.get('type') in EVALUATING}
    if args.vote is not None:
        keep['vote'] = dict(type='VotingHook', times=args.vote, pipeline=_vote_pipeline(cfg))
    if args.pictures is not None:
        keep['pictures'] = dict(type=_pictures_hook(cfg), num_samples=args.pictures)
    for key in ('train_dataloader', 'train_cfg', 'optim_wrapper', 'param_scheduler', 'val_dataloader', 'val_cfg',
                'val_evaluator', 'load_from', 'compile', 'auto_scale_lr'):
        cfg[key] = None
    cfg.resume = False
    cfg.model = without_pretrained(cfg.model)  # the checkpoint has it all, and the file may be elsewhere by now
    cfg.default_hooks, cfg.custom_hooks = keep, None
    try:
        runner = Runner.from_cfg(cfg)
        _check_classes(meta, runner, args.checkpoint)
        load_any(unwrapped(runner.model), checkpoint, weights, args.checkpoint)
        runner.logger.info(f'{args.checkpoint}: {kind} weights')
        metrics = runner.test()
        data = runner.test_dataloader.dataset
        result = {**{k: float(v) for k, v in metrics.items()}, 'config': args.config, 'checkpoint': args.checkpoint,
                  'weights': kind, 'epoch': meta.get('epoch'), **_describe_data(cfg, data),
                  'seed': meta.get('seed', runner.seed)}
        if is_main_process():
            out = atomic_write(Path(cfg.work_dir) / 'metrics.json', json.dumps(result, indent=2) + '\n')
            shown = (f'{k} {v:.2f}' for k, v in metrics.items() if not is_of_one_class(k))
            sys.stdout.write('  '.join(shown) + f'  → {out}\n')
    finally:
        _leave_group()
    return 0


def _pictures_hook(cfg: Config) -> str:
    metrics = cfg.get('test_evaluator') or []
    kinds = [metric.get('type') for metric in (metrics if isinstance(metrics, list) else [metrics])]
    for kind in kinds:
        if kind in PICTURES:
            return PICTURES[kind]
    raise ValueError(f'--pictures draws what {" or ".join(PICTURES)} judges; the test_evaluator is {kinds}')


def _vote_pipeline(cfg: Config) -> list:
    from ewa3d.engine.derive import dataset_cfgs
    training = dataset_cfgs(cfg.get('train_dataloader'))
    pipeline = cfg.get('vote_pipeline') or (training[-1].get('pipeline') if training else None)
    if not pipeline:
        raise ValueError('--vote: the config has neither a vote_pipeline nor a pipeline of its training data')
    return pipeline


def _check_classes(meta: dict, runner, checkpoint: str) -> None:
    """Refuse to evaluate on the same classes in another order: the numbers would mean nothing."""
    trained = (meta.get('dataset_meta') or {}).get('classes')
    data = getattr(runner.build_test_loop(runner._test_loop).dataloader.dataset, 'metainfo', None) or {}
    here = list(data.get('classes') or [])
    if trained and here and sorted(trained) == sorted(here) and list(trained) != here:
        raise ValueError(f'{checkpoint} was trained with the classes in another order: {trained[:5]} … there, '
                         f'{here[:5]} … in the data set')


def _describe_data(cfg: Config, dataset) -> dict:
    from ewa3d.engine.derive import dataset_cfgs
    if hasattr(dataset, 'names'):  # a mixture
        return dict(dataset=' + '.join(dataset.names), split=dataset.split, points=None, samples=len(dataset))
    inner = dataset_cfgs(cfg.test_dataloader)[-1]
    points, samples = dataset[0]['inputs'].get('points'), len(dataset)
    kind = inner.get('type')
    while not hasattr(dataset, 'split') and hasattr(dataset, 'dataset'):
        dataset = dataset.dataset  # wrappers: the split is the data set's own
    root = getattr(dataset, 'data_root', None)
    of_folder = f' {Path(root).resolve().name}' if kind == 'FolderPointCloud' and root else ''
    return dict(dataset=f'{kind}{inner.get("variant", "")}{of_folder}',
                split=getattr(dataset, 'split', inner.get('split')),
                points=None if points is None else int(points.shape[0]), samples=samples)


def fewshot(args) -> int:
    """Train and evaluate every fold of a few-shot task."""
    from ewa3d.fewshot import command
    return command(args)


def fuse(args) -> int:
    """Write the plain weights of a checkpoint, checked against the expanded model."""
    from ewa3d.fusing import fuse_checkpoint
    report = fuse_checkpoint(args.checkpoint, args.out, config=args.config and load_config(args.config),
                             weights=args.weights)
    sys.stdout.write(f'{report}\n')
    return 0 if report.written else 1


def convert(args) -> int:
    """Rename official weights to ours, or ours to official ones."""
    from ewa3d.convert import convert_checkpoint
    report = convert_checkpoint(args.kind, args.source, args.out, args.to_official, args.weights)
    sys.stdout.write(f'{report}\n')
    return 0 if report.written else 1
