"""``python -m ewa3d VERB …``: the console command without its script."""
import sys

from ewa3d.cli import main

if __name__ == '__main__':
    sys.exit(main())
