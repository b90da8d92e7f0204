"""Compare variants of steps, layers and operators in one run: python tools/bench.py [suite ...] --help"""
from ewa3d.bench import main

if __name__ == '__main__':
    raise SystemExit(main())
