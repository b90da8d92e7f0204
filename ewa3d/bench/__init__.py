"""Benchmarks: variants of the same work, timed in one run. ``python tools/bench.py --help``."""
from ewa3d.bench.harness import Case, Row, Settings, measure, report
from ewa3d.bench.main import SUITES, main

__all__ = ['Case', 'Row', 'Settings', 'measure', 'report', 'SUITES', 'main']
