"""``ewa3d data check`` and ``ewa3d data convert``."""
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from ewa3d.cli.options import Parser, add_cfg_options, load_config
from ewa3d.registry import nearest

__all__ = ['ACTIONS', 'check', 'convert', 'main']

ACTIONS = {  # verb → (module:function, what it does)
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
    lines = [f'  {verb}  {what}' for verb, (_, what) in ACTIONS.items()]
    parser = Parser('ewa3d data', usage='ewa3d data VERB …', keep_lines=True, epilog='\n'.join(['verbs:', *lines]))
    parser.parse_args(argv)
    parser.print_help()
    return 2


def check(argv: Sequence[str] | None = None) -> int:
    """``ewa3d data check CONFIG``: reads every sample; 1 where something is wrong."""
    from ewa3d.datasets.survey import survey
    args = _arguments('check', argv)
    wrong = 0
    for where, cfg in _datasets(args):
        found = survey(cfg)
        wrong += len(found.problems)
        sys.stdout.write(f'{where}={found}\n')
    return int(wrong > 0)


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
    parser.add_argument('config', help="a config, or its name; or the folder of your own clouds, FOLDER/<class>/*")
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
