"""``python tools/fuse.py --help``: see ewa3d/cli/weights.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['fuse', *sys.argv[1:]]))
