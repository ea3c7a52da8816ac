"""Outcomes: verdicts, results files, the floor, known failures, the table of a run. Standard library only.

Public: `Verdict` and the sets of statuses (verdict.py); `Record`, a verdict as JSON, `Results` and `read_results`
(file.py); `merge`; `read_floor` and `shortfalls`; `known_failures.read`; `summary.render`.
"""
