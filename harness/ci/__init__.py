"""The CI matrix, the durations of its shards, the gathered verdict, annotations. Standard library only.

Public: `python3 -m harness.ci.matrix` and `python3 -m harness.ci.gather`, for jobs that install nothing; `MatrixRow`
and `read` (matrix.py); `split` (durations.py).
"""
