"""Exact counts of one call: launches, allocations, operators, machine code; and the baseline of these counts.

Public: measure and CallCounts (structure.py), differences (differences.py), compile_launches (compiled.py), check
(baseline.py), read and BASELINE (baseline_file.py), and the lines of report.py.
"""
