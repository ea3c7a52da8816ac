"""The time limit of a case, for calls that may never return to Python."""

from __future__ import annotations

import faulthandler
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

GRACE = 10  #: seconds after the limit until a process that cannot even run Python any more is ended


@contextmanager
def time_limit(seconds: float, expired: Callable[[], None], stderr: Any) -> Iterator[None]:
    """A thread that ends the process in good order; and, for a driver call that lets no thread run, one that just ends
    it (faulthandler's needs no interpreter)."""
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
