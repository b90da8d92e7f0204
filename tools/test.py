"""``python tools/test.py --help``: see ewa3d/cli/evaluate.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['test', *sys.argv[1:]]))
