"""A failure explained: where it is, which pattern it has, which mistake it looks like, which stage makes it.

`failure` (failure.py) makes the whole of it; faults/ is the bank of wrong oracles.
"""
