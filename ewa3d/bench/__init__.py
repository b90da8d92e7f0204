"""Benchmarks: variants of the same work, timed in one run. ``python tools/bench.py --help``."""
from ewa3d.bench.harness import Case, Row, Settings, Work, measure, report
from ewa3d.bench.main import SUITES, main

__all__ = ['Case', 'Row', 'Settings', 'Work', 'measure', 'report', 'SUITES', 'main']
