"""``python tools/fewshot.py --help``: see ewa3d/cli/fewshot.py."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main(['fewshot', *sys.argv[1:]]))
