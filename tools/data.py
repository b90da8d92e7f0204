"""``python tools/data.py --help``: see ewa3d/cli/data.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['data', *sys.argv[1:]]))
