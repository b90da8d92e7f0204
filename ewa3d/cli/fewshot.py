"""``ewa3d fewshot``."""
from collections.abc import Sequence

from ewa3d.cli.options import Parser, configured

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d fewshot CONFIG``."""
    from ewa3d.fewshot import command
    parser = configured(Parser('ewa3d fewshot', description='Train on every fold of a few-shot task; mean and std over '
                                                            'folds.'))
    parser.add_argument('--way', type=int, nargs='+', help="number of classes; default: the config's. Several ways "
                                                           'and shots are tasks one after the other')
    parser.add_argument('--shot', type=int, nargs='+', help="training clouds of each; default: the config's")
    parser.add_argument('--folds', type=int, default=10, help='default: 10; those that are done are skipped')
    parser.add_argument('--pretrained', metavar='PATH', help='weights to start from: model.pretrained of the config')
    parser.add_argument('--seed', type=int, help="of every fold; default: the config's, else 0")
    parser.add_argument('--keep-checkpoints', action='store_true', help='they are deleted when a fold is done')
    return command(parser.parse_args(argv))
