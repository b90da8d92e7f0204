"""``browse CONFIG``: what a model is given, after all transforms of the pipeline; PNG and pages, no display needed."""
import sys
from collections.abc import Sequence
from pathlib import Path

from ewa3d.checks import check_integer
from ewa3d.datasets.io import import_open3d
from ewa3d.engine.derive import dataset_cfgs
from ewa3d.files import check_writable
from ewa3d.gallery import by_source, sample_cells, write_gallery
from ewa3d.registry import DATASETS
from ewa3d.viewer import show_clouds

__all__ = ['browse', 'main']


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d browse CONFIG [--split] [--num] [--epoch] [--out] [--ply] [--cfg-options]``: draw and tell where."""
    from ewa3d.cli.options import Parser, add_cfg_options, load_config
    parser = Parser('ewa3d browse', description='Pictures of what a model is given, after the transforms.')
    parser.add_argument('config', help='a file, or a name from `ewa3d configs`')
    add_cfg_options(parser)
    parser.add_argument('--split', choices=['train', 'val', 'test'], default='train', help='default: train')
    parser.add_argument('--num', type=int, default=12, help='samples of each data set (12), spread evenly')
    parser.add_argument('--epoch', type=int, default=0, help='whose augmentation is shown (0)')
    parser.add_argument('--out', type=Path, help='a folder; default: browse/<name of the config>')
    parser.add_argument('--ply', action='store_true', help='write every cloud as a PLY file as well')
    parser.add_argument('--window', action='store_true', help='show the clouds in a window of open3d afterwards')
    args = parser.parse_args(argv)
    cfg = load_config(args.config, args.cfg_options)
    out = args.out or Path('browse') / Path(args.config).stem
    check_writable(out, '--out')
    if args.window:
        import_open3d()
    sys.stdout.writelines(f'{path}\n' for path in browse(cfg, out, args.split, args.num, args.epoch, args.ply,
                                                          args.window))
    return 0


def browse(cfg, out: str | Path, split: str = 'train', num: int = 12, epoch: int = 0, ply: bool = False,
           window: bool = False) -> list[Path]:
    """Pictures of samples of a config's data, as a model is given them; of a mixture, one picture a source.

    Args:
        cfg: a config. out: the folder to write to. split: which loader. num: samples of each data set, spread evenly.
        epoch: whose augmentation is shown; under the seed that the config gives its run. ply: write the clouds, too.
        window: show the clouds of each data set in a window of open3d, until it is closed.

    Returns:
        the files.

    Raises:
        KeyError: the config has no such loader, or inputs that cannot be drawn. ValueError, TypeError: bad numbers.
    """
    check_integer('num', num, 1)
    check_integer('epoch', epoch, 0)
    loader = cfg.get(f'{split}_dataloader')
    if not dataset_cfgs(loader):
        raise KeyError(f'the config has no {split}_dataloader with a dataset')
    dataset = DATASETS.build(loader['dataset'])
    seed = (cfg.get('randomness') or {}).get('seed')
    written = []
    for name, source, indices in by_source(dataset, num):
        if split == 'train' and hasattr(source, 'set_epoch'):
            source.set_epoch(epoch)
        if getattr(source, 'seed', 0) is None and split == 'train':
            source.seed = seed
        items = [source[i] for i in indices]
        heading = f'{name or type(source).__name__}, {split}: {len(source)} samples; {_shapes(items[0])}'
        written += write_gallery(items, source, Path(out) / f'{split}{f"_{name}" if name else ""}', heading, ply=ply)
        if window:
            cells = sample_cells(items, source)
            if 'clouds' not in cells:
                raise KeyError(f'{heading}: a window shows clouds; the pictures are in {out}')
            show_clouds(cells['clouds'], cells.get('colors'), heading)
    return written


def _shapes(item) -> str:
    """What a sample's inputs are, ``points (1024, 3)``."""
    return ', '.join(f'{key} {tuple(value.shape)}' for key, value in item['inputs'].items() if hasattr(value, 'shape')
                     and value.ndim)
