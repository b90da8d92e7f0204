"""``ewa3d data prepare``, ``ewa3d data check`` and ``ewa3d data convert``."""
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from ewa3d.checks import check_number
from ewa3d.cli.options import Parser, add_cfg_options, load_config
from ewa3d.config_files import find_config, list_configs
from ewa3d.registry import nearest

__all__ = ['ACTIONS', 'check', 'convert', 'main', 'prepare']

ACTIONS = {  # verb → (module:function, what it does)
    'prepare': ('ewa3d.cli.data:prepare', 'download a published data set, or say how to get it'),
    'check': ('ewa3d.cli.data:check', 'what is there, what is missing, what is wrong'),
    'convert': ('ewa3d.cli.data:convert', 'order the clouds by farthest point sampling, once, before training'),
}
SPLITS = ('train', 'val', 'test')


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d data VERB …``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith('-'):
        if argv[0] not in ACTIONS:
            raise ValueError(f'ewa3d data has no verb {argv[0]!r}; {nearest(argv[0], ACTIONS)}')
        module, _, function = ACTIONS[argv[0]][0].partition(':')
        return getattr(import_module(module), function)(argv[1:])
    width = max(map(len, ACTIONS))
    lines = [f'  {verb:<{width}}  {what}' for verb, (_, what) in ACTIONS.items()]
    parser = Parser('ewa3d data', usage='ewa3d data VERB …', keep_lines=True, epilog='\n'.join(['verbs:', *lines]))
    parser.parse_args(argv)
    parser.print_help()
    return 2


def prepare(argv: Sequence[str] | None = None) -> int:
    """``ewa3d data prepare NAME``: 0 where the data set is there and nothing is wrong with it, 1 where something is, or
    where something has to be done by hand (what, is printed)."""
    from ewa3d.datasets import prepare as preparing
    from ewa3d.datasets.sources import SOURCES, find_source
    from ewa3d.datasets.survey import config_line
    width = max(map(len, SOURCES))
    lines = [f'  {name:<{width}}  {source.what}' for name, source in SOURCES.items()]
    parser = Parser('ewa3d data prepare', description=ACTIONS['prepare'][1], keep_lines=True, epilog='\n'.join([
        'data sets:', *lines, '', 'exit code: 0 the data set is there, 1 something has to be done by hand or is wrong, '
        '2 it cannot be had']))
    parser.add_argument('name', metavar='NAME', help='see below')
    parser.add_argument('--root', type=Path, default=Path('data'), help='where it is put; default: data')
    parser.add_argument('--keep-archives', action='store_true', help='do not delete what was downloaded')
    parser.add_argument('--url', nargs='+', default=[], metavar='MIRROR', help='is asked before the known mirrors')
    parser.add_argument('--offline', action='store_true', help='use an archive that lies in the root')
    parser.add_argument('--timeout', type=float, default=30., metavar='SECONDS', help='without a byte; default: 30')
    args = parser.parse_args(argv)
    check_number('--timeout', args.timeout, '(0, inf)')
    source = find_source(args.name)
    was_there = preparing.inventory(source, args.root).complete
    try:
        ready = preparing.prepare(source, args.root, urls=args.url, offline=args.offline, keep=args.keep_archives,
                                  timeout=args.timeout, tell=_tell)
        if ready and not was_there:
            _tell('reading every sample; Ctrl-C stops that and changes nothing')
            return _check_source(source, args.root)
    except KeyboardInterrupt:
        sys.stderr.write('interrupted; the same command continues\n')
        return 130
    if ready:
        for where, cfg in preparing.configs_of(source, args.root):
            _tell(f'{where}={config_line(cfg)}')
        _tell(f'ewa3d data check {args.name} --root {args.root} reads all of it')
    elif (args.root / source.folder).is_dir():
        _tell(str(preparing.inventory(source, args.root)))
    return int(not ready)


def check(argv: Sequence[str] | None = None) -> int:
    """``ewa3d data check NAME``, ``CONFIG`` or ``FOLDER``: reads every sample; 1 where something is wrong."""
    from ewa3d.datasets.sources import SOURCES
    from ewa3d.datasets.survey import survey
    args = _arguments('check', argv)
    if args.config in SOURCES:
        return _check_source(SOURCES[args.config], args.root, args.split)
    _check_name(args.config)
    wrong = 0
    for where, cfg in _datasets(args):
        found = survey(cfg)
        wrong += len(found.problems)
        _tell(f'{where}={found}')
    return int(wrong > 0)


def _check_name(name: str) -> None:
    """Raise where there is neither a config nor a folder of this name; the data sets are named as well."""
    from ewa3d.datasets.sources import SOURCES
    if Path(name).is_dir():
        return
    try:
        find_config(name)
    except FileNotFoundError:
        if '/' in name:
            raise
        configs = [config.rpartition('/')[2] for config in list_configs()]
        hint = nearest(name, [*SOURCES, *configs])
        raise FileNotFoundError(f'there is no data set, config or folder {name!r}; '
                                f'{hint if hint.endswith("?") else "data sets: " + ", ".join(SOURCES)}') from None


def _check_source(source, root: Path, splits: Sequence[str] | None = None) -> int:
    """The files of a published data set, then every sample."""
    from ewa3d.datasets.prepare import configs_of, inventory
    from ewa3d.datasets.survey import survey
    found = inventory(source, root)
    _tell(f'{source.name}: {source.what}\n  terms: {source.terms} ({source.page})\n{found}')
    if not found.folder.is_dir():
        _tell(f'  ewa3d data prepare {source.name} --root {root} gets it, or says how')
        return 1
    wrong = not found.complete
    for where, cfg in configs_of(source, root):
        if splits is None or cfg['split'] in splits:
            samples = survey(cfg, cache=False)
            wrong |= bool(samples.problems)
            _tell(f'{where}={samples}')
    if source.configs:
        _tell(f"configs that train on it: ewa3d configs '{source.configs}'")
    return int(wrong)


def _tell(text: str) -> None:
    sys.stdout.write(f'{text}\n')
    sys.stdout.flush()


def convert(argv: Sequence[str] | None = None) -> int:
    """``ewa3d data convert CONFIG``: writes the caches that training would write at its start."""
    from ewa3d.registry import DATASETS
    args = _arguments('convert', argv)
    for where, cfg in _datasets(args):
        folder = getattr(getattr(DATASETS.build(dict(cfg)), '_clouds', None), 'folder', None)
        sys.stdout.write(f'{where}: {"is read as it is, without a cache" if folder is None else f"cache {folder}"}\n')
    return 0


def _arguments(verb: str, argv: Sequence[str] | None):
    parser = Parser(f'ewa3d data {verb}', description=ACTIONS[verb][1])
    names = 'the name of a data set (ewa3d data prepare --help lists them), ' if verb == 'check' else ''
    parser.add_argument('config', help=f"{names}a config, or its name; or the folder of your own clouds, "
                                       'FOLDER/<class>/*')
    if verb == 'check':
        parser.add_argument('--root', type=Path, default=Path('data'), help='where data sets are; default: data')
    parser.add_argument('--split', nargs='+', choices=SPLITS, help='default: all that there are')
    add_cfg_options(parser)
    return parser.parse_args(argv)


def _datasets(args) -> Iterator[tuple[str, Mapping]]:
    """Where a data set stands in a config, and its own; each once."""
    from ewa3d.datasets.survey import data_config
    if Path(args.config).is_dir():
        yield from _folder(Path(args.config), args.split)
        return
    cfg, seen = load_config(args.config, args.cfg_options), []
    for split in args.split or [split for split in SPLITS if cfg.get(f'{split}_dataloader')]:
        found = data_config(cfg, split)
        sources = found.get('sources') or {'': found}
        for name, source in sources.items():
            plain = {key: value for key, value in source.items() if key != 'pipeline'}
            if plain not in seen:
                seen.append(plain)
                yield f'{split}_dataloader.dataset' + (f'.sources.{name}' if name else ''), source


def _folder(root: Path, splits: Sequence[str] | None) -> Iterator[tuple[str, Mapping]]:
    from ewa3d.datasets.folder import Tree
    for split in splits or Tree(root).splits or ['train']:
        yield f'{split}_dataloader.dataset', dict(type='FolderPointCloud', data_root=str(root), split=split)
