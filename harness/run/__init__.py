"""One case, one verdict.

`case.run_case` judges a case in this process, `isolated.IsolatedRunner` in another one; `fuzz.fuzz` looks for a case
that fails; capabilities.py compares what a backend declares with what it does.
"""
