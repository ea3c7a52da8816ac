"""One case, one verdict.

`case.run_case` judges a case in this process; `supervisor.Supervisor` has a worker process (worker.py) judge it, and
`isolated.IsolatedRunner` is a supervisor of one backend. leftovers.py finds threads and processes that a case leaves
behind, guard.py what it changes in its process (globals/). `fuzz.fuzz` looks for a case that fails; capabilities.py
compares what a backend declares with what it does.
"""
