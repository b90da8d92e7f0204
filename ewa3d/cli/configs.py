"""``ewa3d configs``."""
import sys
from collections.abc import Sequence

from ewa3d.cli.options import Parser
from ewa3d.config_files import list_configs

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d configs [PATTERN]``."""
    parser = Parser('ewa3d configs', description='List the configs that come with the package.')
    parser.add_argument('pattern', nargs='?', default='*', help="such as '*modelnet*'; default: all")
    names = list_configs(parser.parse_args(argv).pattern)
    sys.stdout.write(''.join(f'{name}\n' for name in names))
    return 0 if names else 1
