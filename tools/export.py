"""``python tools/export.py --help``: see ewa3d/cli/export.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['export', *sys.argv[1:]]))
