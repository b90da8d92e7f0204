"""``python tools/bench.py [suite ...] --help``: compare variants of steps, layers and operators in one run."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['bench', *sys.argv[1:]]))
