"""``python tools/compare.py --help``: see ewa3d/compare.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['compare', *sys.argv[1:]]))
