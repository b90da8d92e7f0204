"""``python tools/browse.py --help``: see ewa3d/browse.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['browse', *sys.argv[1:]]))
