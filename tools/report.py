"""``python tools/report.py --help``: see ewa3d/report.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['report', *sys.argv[1:]]))
