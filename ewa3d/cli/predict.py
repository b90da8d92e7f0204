"""``ewa3d predict``."""
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ewa3d.cli.options import Parser, add_cfg_options, load_config
from ewa3d.files import atomic_write, check_writable

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d predict CONFIG CHECKPOINT FILES…``: classes, parts or boxes, a line a file."""
    import torch

    import ewa3d
    parser = Parser('ewa3d predict', description='What a checkpoint says about files.')
    parser.add_argument('config', help='a file, or a name from `ewa3d configs`')
    parser.add_argument('checkpoint')
    parser.add_argument('files', nargs='+', metavar='FILE', help='a cloud, mesh or image')
    parser.add_argument('--json', metavar='OUT', help='write all there is, such as the part of every point')
    parser.add_argument('--category', nargs='+', help='of part segmentation: one for all files, or one each')
    parser.add_argument('--task', help='of a model with several')
    parser.add_argument('--threshold', type=float, help="of boxes; default: the evaluation's")
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: %(default)s')
    add_cfg_options(parser)
    args = parser.parse_intermixed_args(argv)  # files may come behind options
    if args.json:
        if Path(args.json).is_dir():
            raise IsADirectoryError(f'--json {args.json} is a folder; the name of a file was expected')
        check_writable(Path(args.json).parent, '--json: the folder')
    for file in args.files:  # before the model is built
        if not Path(file).exists():
            raise FileNotFoundError(f'{file}: there is no such file')
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f'--device {args.device}: {str(error).splitlines()[0]}') from None
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {args.device}: torch sees no CUDA device here')
    model = ewa3d.build(load_config(args.config, args.cfg_options), args.checkpoint)
    if not hasattr(model, 'usage'):
        raise ValueError(f'{args.config}: a {type(model).__name__} has no classes, parts or boxes to predict')
    category = args.category[0] if args.category and len(args.category) == 1 else args.category
    found = model.to(device).predict(list(args.files), category=category, task=args.task, threshold=args.threshold,
                                     batch_size=args.batch_size)
    for one in found:
        sys.stdout.write(f'{one.name}  {one}\n')
    if args.json:
        out = atomic_write(args.json, json.dumps([one.as_dict() for one in found], indent=1) + '\n')
        sys.stdout.write(f'→ {out}\n')
    return 0
