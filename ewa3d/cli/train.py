"""``ewa3d train``."""
import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from ewa3d.cli.options import Parser, default_work_dir, prepare, running

__all__ = ['main', 'train']


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d train CONFIG``."""
    parser = running(Parser('ewa3d train', description='Train a model.'))
    parser.add_argument('--resume', nargs='?', const='auto', metavar='auto|PATH',
                        help='continue from the last checkpoint in the work dir, or from PATH')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--seed', type=int, help="default: the config's, else 0")
    parser.add_argument('--print-config', action='store_true', help='print the resolved config and stop')
    return train(parser.parse_args(argv))


def train(args) -> int:
    """Train a model from a config."""
    from ewa3d.engine.validate import check_config
    cfg = prepare(args)
    check_config(cfg)
    if args.amp:
        _use_autocast(cfg)
    resumed = _resolve_resume(cfg, args.resume)
    seed = args.seed if args.seed is not None else (cfg.get('randomness') or {}).get('seed')
    if args.seed is None and resumed is not None:
        from ewa3d.engine.intact import read_once
        seed = (read_once(resumed, keep=True).get('meta') or {}).get('seed', seed)  # the run goes on as it began
    cfg.randomness = dict(cfg.get('randomness') or {}, seed=0 if seed is None else seed)

    from ewa3d.engine.derive import fill_num_classes
    from ewa3d.engine.ranks import leave_group
    from ewa3d.engine.runner import Runner
    if args.print_config:
        with contextlib.suppress(FileNotFoundError):  # a config can be read where its data are not
            fill_num_classes(cfg)
        if not args.work_dir and cfg.work_dir == default_work_dir(args.config):
            cfg.pop('work_dir')  # written to a file, the config has another name
        sys.stdout.write(cfg.pretty_text)
        return 0
    try:
        Runner.from_cfg(cfg).train()
    except Exception as error:
        _log_failure(cfg.work_dir, error)
        raise
    except SystemExit:  # after a signal, which all ranks left together
        leave_group()
        raise
    leave_group()
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


def _log_failure(work_dir: str, error: Exception) -> None:
    """A run that fails at night leaves its traceback in the log; of several processes, that of the first to fail."""
    log = Path(work_dir) / 'train.log'
    if log.is_file() and os.environ.get('RANK', '0') == '0':
        with open(log, 'a', encoding='utf-8') as file:
            file.write(getattr(error, 'first_traceback', '') or traceback.format_exc())
