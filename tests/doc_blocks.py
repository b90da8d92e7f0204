"""Fenced blocks of the documentation: found, run, or checked.

What stands in front of a block, and the word behind its fence, say what is done with it:

* ``python``: run, in the order of the page; blocks of one page share their names and a working directory, and what the
  page takes for granted (a ``loader``, a file) is made by ``doc_worlds.py``. Afterwards every ``dict(type=…)`` that
  it left in a variable has to name a registered component and keywords that this takes.
* ``sh``: not run, but checked: the shell has to read it, its commands, files and options have to exist, configs have
  to load with the options given. Words in capitals (CONFIG) stand for something. Behind ``<!-- run -->`` the commands
  are run as well.
* ``json``: read. ``text``: no code (a tree of folders, a formula, what a command prints).
* ``<!-- not run: why -->`` in front of any: left alone.
"""
import argparse
import contextlib
import copy
import functools
import importlib
import io
import json
import re
import shutil
import subprocess
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from mmengine.config import Config

from ewa3d import cli, registry
from ewa3d.cli.options import load_config
from ewa3d.engine.validate import check_config
from ewa3d.reparam import RULE_KEYS, Reparam

__all__ = ['ROOT', 'Block', 'Page', 'blocks_of', 'check_command', 'check_types', 'words_of']

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r'^(?:[ ]*<!-- (?P<mark>[^\n]*?) -->\n)?(?P<indent>[ ]*)```(?P<language>[^\n]*)\n(?P<text>.*?)'
                   r'^(?P=indent)```[ ]*$', re.DOTALL | re.MULTILINE)
MARK = re.compile(r'run|not run: .{8,}')
EXAMPLES = {'CONFIG': 'configs/quickstart/ewa.py', 'S': '0'}
RECORDER = r"""
exec 3>"$1"
PATH=/nowhere
command_not_found_handle() { printf '%s\0' "$@" $'\001' >&3; }
.() { command_not_found_handle source "$@"; }
"""


class Block(NamedTuple):
    """``mark`` is what the comment in front says, ``line`` the first one of the text in the file."""
    where: str
    line: int
    language: str
    mark: str
    text: str

    @property
    def left_alone(self) -> bool:
        return self.mark.startswith('not run')


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a page, each of a known language."""
    page, found = path.read_text(encoding='utf-8'), []
    for match in FENCE.finditer(page):
        mark, line = match['mark'] or '', 1 + page.count('\n', 0, match.start('text'))
        if mark and not MARK.fullmatch(mark):
            raise ValueError(f'{path}:{line - 2}: the mark of a block is "run" or "not run: why", got {mark!r}')
        found.append(Block(f'{path.relative_to(ROOT)}:{line}', line, match['language'].strip(), mark,
                           textwrap.dedent(match['text'])))
    return found


class Page:
    """A page that is gone through block by block, in the current folder."""

    def __init__(self, path: Path, names: Mapping):
        self.path, self.names = path, {'__name__': 'page', **names}
        self.change = lambda text: text  # makes what is run smaller
        self.skipped: list[str] = []  # commands that are not there, or whose packages are not

    def go(self) -> None:
        for block in blocks_of(self.path):
            if not block.left_alone:
                try:
                    getattr(self, f'_{block.language or "nothing"}')(block)
                except Exception as error:
                    raise AssertionError(f'{block.where}: {type(error).__name__}: {error}') from error

    def _python(self, block: Block) -> None:
        before = dict(self.names)
        code = '\n' * (block.line - 1) + self.change(block.text)
        exec(compile(code, str(self.path), 'exec'), self.names)
        check_types({name: value for name, value in self.names.items() if value is not before.get(name)})

    def _sh(self, block: Block) -> None:
        for line in logical_lines(block.text):
            for words in words_of(line):
                if block.mark == 'run':
                    self._run(line, words)
                else:
                    check_command(words)

    def _run(self, line: str, words: list[str]) -> None:
        """A command, in this process; what it prints goes where the line says."""
        assert words[0] == 'ewa3d', f'only ewa3d is run here, not {words[0]}'
        out, errors, target = io.StringIO(), io.StringIO(), re.search(r' > (\S+)', line)
        words = self.change('\n'.join(words)).split('\n')
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = cli.main(words[1:])
        if code and 'pip install' in errors.getvalue():
            self.skipped.append(errors.getvalue())
            return
        assert code == 0, f'{line}: exit code {code}: {errors.getvalue()[-2000:]}{out.getvalue()[-2000:]}'
        if target:
            Path(target[1]).write_text(self.change(out.getvalue()), encoding='utf-8')

    def _json(self, block: Block) -> None:
        json.loads(block.text)

    def _text(self, block: Block) -> None:
        pass


# ---------------------------------------------------------------------------------------------------------------------
# Shell
# ---------------------------------------------------------------------------------------------------------------------
def logical_lines(text: str) -> list[str]:
    """Lines of a script, those that end in a backslash joined with the next one."""
    return [line for line in text.replace('\\\n', ' ').splitlines() if line.strip()]


def words_of(line: str) -> list[list[str]]:
    """The commands of a line as the shell takes it apart, none of them run."""
    bash = shutil.which('bash')
    if bash is None:
        pytest.skip('there is no bash here')
    record = Path('.record')
    for word, value in EXAMPLES.items():
        line = re.sub(rf'(?<![\w./-]){word}(?![\w./-])', value, line)
    done = subprocess.run([bash, '-c', RECORDER + line + '\n:', 'page', str(record)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, f'{line}: {done.stderr}'
    commands = record.read_bytes().decode().split('\1\0')[:-1]
    record.unlink()
    return [command.removesuffix('\0').split('\0') for command in commands]


class Parsed(BaseException):
    """What the command line of a command says; raised instead of doing it."""


@contextlib.contextmanager
def parsing() -> Iterator[None]:
    """Every command stops when it has parsed its options."""
    def stopping(parse):
        def stop(self, *args, **kwargs):
            raise Parsed(parse(self, *args, **kwargs))
        return stop

    with pytest.MonkeyPatch.context() as patch:
        for name in ('parse_args', 'parse_intermixed_args'):
            patch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
        yield


def parsed(function, argv: list[str]) -> argparse.Namespace:
    errors = io.StringIO()
    try:
        with parsing(), contextlib.redirect_stderr(errors):
            function(argv)
    except Parsed as found:
        return found.args[0]
    except SystemExit:
        pass
    raise AssertionError(f'{" ".join(argv)}: {errors.getvalue()}')


def check_command(words: list[str]) -> None:
    """Raise where a command, its options or its config do not exist."""
    if words[0] in ('torchrun', 'srun'):
        words = ['python', *words[next(i for i, word in enumerate(words) if word.startswith('tools/')):]]
    name, rest = words[0], words[1:]
    if name in ('python', 'python3') and rest[0] == '-m':
        if rest[1].partition('.')[0] == 'ewa3d':
            _check_args(parsed(importlib.import_module(rest[1]).main, rest[2:]))
        else:
            assert rest[1] in ('venv', 'pytest'), f'what is python -m {rest[1]}?'
    elif name == 'python':
        script = (ROOT / rest[0]).read_text(encoding='utf-8')
        check_command(['ewa3d', re.search(r"main\(\['(\w+)'", script)[1], *rest[1:]])
    elif name == 'ewa3d':
        _check_args(parsed(cli.main, rest), rest[0])
    elif name == 'make':
        for target in rest:
            assert '=' in target or re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(), re.MULTILINE), target
    elif name == 'pip':
        extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
        for extra in re.findall(r'\[(\w+)\]', ' '.join(rest)):
            assert extra in extras, f'there is no extra {extra!r}'
    else:
        assert name == 'source', f'what is {name}?'


_read_config = functools.cache(Config.fromfile)


def _check_args(args: argparse.Namespace, verb: str = '') -> None:
    config = getattr(args, 'config', None)
    if isinstance(config, str) and not Path(config).is_dir():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Config, 'fromfile', lambda path: copy.deepcopy(_read_config(Path(path).resolve())))
            cfg = load_config(config, getattr(args, 'cfg_options', None))
        if verb in ('train', 'test'):
            check_config(cfg, training=verb == 'train')


# ---------------------------------------------------------------------------------------------------------------------
# Pieces of configs
# ---------------------------------------------------------------------------------------------------------------------
def check_types(value) -> None:
    """Raise where a ``dict(type='X', …)`` in ``value`` names nothing, or a keyword that X does not take."""
    if isinstance(value, Mapping):
        if isinstance(value.get('type'), str):
            _check_keywords(value)
        for entry in value.values():
            check_types(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            check_types(entry)


def _check_keywords(cfg: Mapping) -> None:
    kind = cfg['type']
    registries = [r for name in registry.__all__ if isinstance(r := getattr(registry, name), registry.Registry)]
    cls = next((r.get(kind) for r in registries if kind in r), None)
    assert cls is not None, f'there is no component {kind!r}'
    if isinstance(cls, type) and issubclass(cls, Reparam) and 'at' in cfg:  # a rule
        rest = {key: entry for key, entry in cfg.items() if key not in (*RULE_KEYS, 'fused')}
        registry.check_keywords(cls.expand, rest, kind)
    else:
        registry.check_keywords(cls, cfg)
