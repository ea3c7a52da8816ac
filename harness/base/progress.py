"""The progress of the case that runs in this process, readable by a supervisor in another process.

A time limit is the backend's: what the harness itself takes to draw inputs, to compute the expected output and to
diagnose a failure is measured apart. Once a case has failed, the end of its diagnosis must not make a hang of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIZE = 24  #: bytes of shared memory: three float64


class CaseProgress:
    """Three numbers in memory that two processes may share: the case's start, finished and current work of the harness.

    All are in seconds of time.monotonic(), which every process of a machine reads alike; 0.0 is "not now".
    """

    def __init__(self) -> None:
        self.attach(bytearray(SIZE))

    def attach(self, memory: Any, failed: Callable[[str], None] = lambda reason: None) -> None:
        """Keep the numbers in `memory`, a writable buffer of SIZE bytes, and call failed(reason) at every failure."""
        self._numbers = memoryview(memory).cast("d")
        self._failed = failed
        self._depth = 0

    def start(self) -> None:
        """A case begins."""
        self._depth = 0
        self._numbers[0], self._numbers[1], self._numbers[2] = time.monotonic(), 0.0, 0.0

    @contextmanager
    def own(self) -> Iterator[None]:
        """Count the time of the block as the harness's own; blocks may contain one another."""
        self._depth += 1
        if self._depth == 1:
            self._numbers[2] = time.monotonic()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._numbers[1] += time.monotonic() - self._numbers[2]
                self._numbers[2] = 0.0

    def failed(self, reason: str) -> None:
        """The case has failed for this reason, whatever becomes of its diagnosis."""
        self._failed(reason)

    def seconds(self) -> tuple[float, float]:
        """(seconds of the backend, seconds of the harness) since the case began; (0, 0) before the first."""
        started, own, since = self._numbers
        if not started:
            return 0.0, 0.0
        now = time.monotonic()
        own += now - since if since else 0.0
        return max(0.0, now - started - own), own


PROGRESS = CaseProgress()  #: of this process: it runs one case at a time
# A backend may fork: its child must not write into the numbers of the case, nor report a failure of it.
os.register_at_fork(after_in_child=lambda: PROGRESS.attach(bytearray(SIZE)))
