"""Is HEAD slower than BASE?

Public: compare, ComparisonRequest, Comparison, Side and exit_code (compare.py), and the lines of report.py.
statistics.py holds the mathematics: pure functions over numbers.
"""
