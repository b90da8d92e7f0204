"""``ewa3d export``."""
import sys
from collections.abc import Sequence

from ewa3d.cli.options import Parser, add_cfg_options, load_config

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d export [CONFIG] CHECKPOINT OUT``: fuse, export, compare with torch."""
    from ewa3d.export import DTYPES, export_checkpoint
    parser = Parser('ewa3d export', description='Fuse a checkpoint and write it for another runtime; what that '
                                                'computes is compared with torch.')
    parser.add_argument('config', nargs='?', help='a file, or a name from `ewa3d configs`; without one that in the '
                                                  'checkpoint, as data')
    parser.add_argument('checkpoint')
    parser.add_argument('out', help='*.onnx; *.pt2 (torch.export); *.safetensors (weights, which ewa3d.build opens)')
    parser.add_argument('--task', help='of a model with several')
    parser.add_argument('--features', action='store_true', help='the model without its head')
    parser.add_argument('--timm', action='store_true', help="*.safetensors with plain timm's own names")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument('--dynamic', action='store_true', help='any batch size and number of points (the default)')
    sizes.add_argument('--static', action='store_true', help='those of --batch and --points alone')
    parser.add_argument('--batch', type=int, metavar='B', help='of the example that is traced; default: 2, static 1')
    parser.add_argument('--points', type=int, metavar='N', help="of the example; default: the config's")
    parser.add_argument('--opset', type=int, help="of ONNX, from 18 on; default: the exporter's")
    parser.add_argument('--dtype', choices=list(DTYPES), default='float32', help='of weights, inputs and outputs')
    parser.add_argument('--tolerance', type=float, help='largest relative difference that is written; default: 1e-4, '
                                                        'for other types their own')
    parser.add_argument('--check-batches', type=int, nargs='+', default=(1, 2, 5), metavar='B', help='default: 1 2 5')
    parser.add_argument('--check-points', type=int, nargs='+', metavar='N', help='default: the least, the usual, a '
                                                                                 'third more')
    parser.add_argument('--seed', type=int, default=0, help='of the inputs that are compared')
    parser.add_argument('--force', action='store_true', help='replace OUT where it exists')
    add_cfg_options(parser)
    args = parser.parse_intermixed_args(argv)
    if args.config is None and args.cfg_options:
        raise ValueError('--cfg-options change a config, and none is given')
    report = export_checkpoint(
        args.checkpoint, args.out, args.config and load_config(args.config, args.cfg_options), task=args.task,
        features=args.features, timm=args.timm, dynamic=not args.static, batch_size=args.batch, num_points=args.points,
        opset=args.opset, dtype=args.dtype, tolerance=args.tolerance, check_batches=args.check_batches,
        check_points=args.check_points, seed=args.seed, force=args.force)
    sys.stdout.write(f'{report}\n')
    return 0 if report.written else 1
