"""``python tools/convert_weights.py --help``: see ewa3d/cli/weights.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['convert', *sys.argv[1:]]))
