"""``python tools/train.py --help``: see ewa3d/cli/train.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['train', *sys.argv[1:]]))
