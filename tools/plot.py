"""``python tools/plot.py --help``: see ewa3d/plot.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['plot', *sys.argv[1:]]))
