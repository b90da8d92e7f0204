"""From the options of a command to a config."""
import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from mmengine.config import Config, DictAction

from ewa3d.config_files import find_config, read_config
from ewa3d.files import check_writable
from ewa3d.registry import nearest

__all__ = ['Parser', 'add_cfg_options', 'configured', 'default_work_dir', 'load_config', 'prepare', 'running']


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line.

    Args:
        keep_lines: the description and the epilog are printed as they stand.
    """

    def __init__(self, prog: str, keep_lines: bool = False, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter if keep_lines else argparse.HelpFormatter
        super().__init__(prog, formatter_class=formatter, **kwargs)
        self.add_argument('--debug', action='store_true', help='show the traceback of an error')

    def error(self, message: str):
        self.exit(2, f'error: {self.prog}: {message}; {self.prog} --help shows what it takes\n')


def configured(parser: Parser) -> Parser:
    """``parser`` with the options of commands that work from a config."""
    parser.add_argument('config', help='a file, or a name from `ewa3d configs`')
    parser.add_argument('--work-dir', help='default: work_dirs/<name of the config>')
    add_cfg_options(parser)
    return parser


def add_cfg_options(parser: Parser) -> None:
    """``--cfg-options k=v …``."""
    parser.add_argument('--cfg-options', nargs='+', action=_Options, default={}, metavar='k=v',
                        help='override parts of the config: train_cfg.max_epochs=30')


def running(parser: Parser) -> Parser:
    """``parser`` with the options of commands that run on several devices, too."""
    configured(parser)
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none')
    parser.add_argument('--local-rank', '--local_rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


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


def load_config(path: str, options: dict | None = None) -> Config:
    """Read a config, a file or a name from :func:`ewa3d.list_configs`, and apply ``--cfg-options``.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it does not run.
        KeyError, TypeError: an option whose first name is in neither the config nor the Runner's keys, or that leads
            through something that has no such part.
    """
    from ewa3d.engine.validate import TOP_LEVEL
    path = find_config(path)
    try:
        cfg = read_config(path)
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


def default_work_dir(config: str) -> str:
    """Where a run of a config goes unless it is told."""
    return str(Path('work_dirs') / Path(config).stem)


def prepare(args) -> Config:
    """The config of a command with :func:`configured` or :func:`running`."""
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or default_work_dir(args.config)
    check_writable(cfg.work_dir, '--work-dir')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg
