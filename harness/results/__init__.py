"""Outcomes: verdicts, results files, the floor, known failures, the table of a run. Standard library only.

Public: `Verdict` and the sets of statuses (verdict.py); `Results`, which writes a file (file.py); `read_results` and
`merge`, which read one and many; `RunRecords`, whether a run is whole (runs.py); `problem` and `published`, the table
of fields (schema.py); `read_floor` and `shortfalls`; `known_failures.read`; `summary.render`.
"""
