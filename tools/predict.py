"""``python tools/predict.py --help``: see ewa3d/cli/predict.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['predict', *sys.argv[1:]]))
