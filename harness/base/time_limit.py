"""The time limit of a case, for calls that may never return to Python."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

GRACE = 10  #: seconds after the limit until faulthandler ends a process in which no Python runs any more


@contextmanager
def time_limit(seconds: float, expired: Callable[[], None], stderr: Any) -> Iterator[None]:
    """Call expired() if the block takes longer than `seconds` (0: no limit); it must end the process.

    A thread calls it, after writing all stacks to stderr. If a driver call lets no thread run, the thread of
    faulthandler, which needs no interpreter, ends the process GRACE seconds later.
    """
    if not seconds:
        yield
        return

    def end() -> None:
        faulthandler.dump_traceback(stderr)
        expired()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        timer.cancel()
