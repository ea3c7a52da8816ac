"""Other commits: their worktrees, and a worker process for each.

Public: Checkouts, Worker, WorkerError and CannotBuild (checkout.py). worker.py is the program of the worker process.
"""
