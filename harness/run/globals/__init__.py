"""The globals of a process that a call must leave as they are: one line each, in arithmetic.py and process.py.

    Global(its name as an expression, read, restore)

They are read before and after every case (guard.py), so reading one takes about a microsecond. Hence the private names
of the standard library and of torch: their public functions take ten times as long.
"""

from harness.run.globals.arithmetic import ARITHMETIC
from harness.run.globals.process import PROCESS
from harness.run.globals.rule import Global

__all__ = ["GLOBALS", "Global"]

#: In the order of reading and restoring.
GLOBALS: tuple[Global, ...] = (*ARITHMETIC, *PROCESS)
