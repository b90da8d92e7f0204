"""``ewa3d fuse`` and ``ewa3d convert``: from one file of weights to another."""
import sys
from collections.abc import Sequence

from ewa3d.cli.options import Parser, load_config

__all__ = ['convert', 'fuse']

KINDS = ('point-mae', 'point-bert', 'dvae', '3detr')
WEIGHTS = ('default', 'ema', 'raw')


def fuse(argv: Sequence[str] | None = None) -> int:
    """``ewa3d fuse CHECKPOINT OUT``: the plain weights, checked against the expanded model."""
    from ewa3d.fusing import fuse_checkpoint
    parser = Parser('ewa3d fuse', description='Write the plain weights of a checkpoint.')
    parser.add_argument('checkpoint')
    parser.add_argument('out', help='*.pth or *.safetensors')
    parser.add_argument('--config', help='for models of your own: a config you trust, whose custom_imports are run; '
                                         'by default the config comes from the checkpoint, as data')
    parser.add_argument('--weights', choices=WEIGHTS, default='default')
    args = parser.parse_args(argv)
    report = fuse_checkpoint(args.checkpoint, args.out, config=args.config and load_config(args.config),
                             weights=args.weights)
    sys.stdout.write(f'{report}\n')
    return 0 if report.written else 1


def convert(argv: Sequence[str] | None = None) -> int:
    """``ewa3d convert KIND SRC OUT``: official weights to ours, or ours to official ones."""
    from ewa3d.convert import convert_checkpoint
    parser = Parser('ewa3d convert', description='Official Point-MAE, Point-BERT and 3DETR weights to ours.')
    parser.add_argument('kind', choices=KINDS, help='point-bert takes its dVAE as well')
    parser.add_argument('source', metavar='SRC')
    parser.add_argument('out', metavar='OUT', help='*.pth or *.safetensors')
    parser.add_argument('--to-official', action='store_true', help='the way back; experts are averaged')
    parser.add_argument('--weights', choices=WEIGHTS, default='default',
                        help='which ones of a run with EMA go --to-official')
    args = parser.parse_args(argv)
    report = convert_checkpoint(args.kind, args.source, args.out, args.to_official, args.weights)
    sys.stdout.write(f'{report}\n')
    return 0 if report.written else 1
