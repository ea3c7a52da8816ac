"""One case, one verdict: `run_case` (case.py) in this process, `isolated.py` in another; fuzzing; capabilities."""
