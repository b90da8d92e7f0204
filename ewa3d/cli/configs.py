"""``ewa3d configs``."""
import sys
from collections.abc import Sequence

from ewa3d.cli.options import Parser
from ewa3d.config_files import list_configs
from ewa3d.registry import nearest

__all__ = ['main']


def main(argv: Sequence[str] | None = None) -> int:
    """``ewa3d configs [PATTERN]``."""
    parser = Parser('ewa3d configs', description='List the configs that come with the package.')
    parser.add_argument('pattern', nargs='?', default='*', help="such as '*modelnet*'; default: all")
    pattern = parser.parse_args(argv).pattern
    names = list_configs(pattern)
    if not names:
        wider = f'*{pattern.strip("*")}*'
        hint = f'did you mean {wider!r}?' if list_configs(wider) else nearest(pattern, list_configs())
        sys.stderr.write(f'no config matches {pattern!r}; {hint}\n')
    sys.stdout.write(''.join(f'{name}\n' for name in names))
    return 0 if names else 1
