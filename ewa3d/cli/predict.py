"""``ewa3d predict``."""
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ewa3d.cli.options import Parser, add_cfg_options, load_config
from ewa3d.config_files import is_checkpoint
from ewa3d.files import atomic_write, check_writable

__all__ = ['main']

DRAWN = 24  # files of which --pictures are made


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d predict [CONFIG] CHECKPOINT FILES…``: classes, parts or boxes, a line a file."""
    import torch

    import ewa3d
    parser = Parser('ewa3d predict', description='What a checkpoint says about files.')
    parser.add_argument('config', nargs='?', help='a file, or a name from `ewa3d configs`; without one that in the '
                                                  'checkpoint, as data')
    parser.add_argument('checkpoint')
    parser.add_argument('files', nargs='+', metavar='FILE', help='a cloud, mesh or image')
    parser.add_argument('--json', metavar='OUT', help='write all there is, such as the part of every point')
    parser.add_argument('--pictures', type=Path, metavar='FOLDER',
                        help=f'predictions.png and .html of the first {DRAWN} files, and of each cloud a .ply')
    parser.add_argument('--category', nargs='+', help='of part segmentation: one for all files, or one each')
    parser.add_argument('--task', help='of a model with several')
    parser.add_argument('--threshold', type=float, help="of boxes; default: the evaluation's")
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu', help='default: %(default)s')
    add_cfg_options(parser)
    args = parser.parse_intermixed_args(argv)  # files may come behind options
    if is_checkpoint(args.config):  # and no config before it
        args.config, args.checkpoint, args.files = None, args.config, [args.checkpoint, *args.files]
    if args.config is None and args.cfg_options:
        raise ValueError('--cfg-options change a config, and none is given')
    if args.json:
        if Path(args.json).is_dir():
            raise IsADirectoryError(f'--json {args.json} is a folder; the name of a file was expected')
        check_writable(Path(args.json).parent, '--json: the folder')
    if args.pictures:
        check_writable(args.pictures, '--pictures')
    for file in args.files:  # before the model is built
        if not Path(file).exists():
            raise FileNotFoundError(f'{file}: there is no such file')
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise ValueError(f'--device {args.device}: {str(error).splitlines()[0]}') from None
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'--device {args.device}: torch sees no CUDA device here')
    cfg = args.checkpoint if args.config is None else load_config(args.config, args.cfg_options)
    model = ewa3d.build(cfg, args.checkpoint)
    if not hasattr(model, 'usage'):
        raise ValueError(f'{args.config or args.checkpoint}: a {type(model).__name__} has no classes, parts or boxes '
                         'to predict')
    category = args.category[0] if args.category and len(args.category) == 1 else args.category
    found = model.to(device).predict(list(args.files), category=category, task=args.task, threshold=args.threshold,
                                     batch_size=args.batch_size)
    for one in found:
        sys.stdout.write(f'{one.name}  {one}\n')
    if args.json:
        out = atomic_write(args.json, json.dumps([one.as_dict() for one in found], indent=1) + '\n')
        sys.stdout.write(f'→ {out}\n')
    if args.pictures:
        sys.stdout.writelines(f'→ {path}\n' for path in _draw(model, args.files[:DRAWN], found, args))
    return 0


def _draw(model, files: Sequence[str], found: Sequence, args) -> list[Path]:
    from ewa3d.gallery import write_predictions
    from ewa3d.inference import originals
    inputs, up = originals(model, files, args.task)
    return write_predictions(found[:len(files)], inputs, args.pictures / 'predictions', up, Path(args.checkpoint).name,
                             ply=True)
