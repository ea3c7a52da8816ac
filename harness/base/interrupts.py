"""The user's Ctrl-C, distinguished from a KeyboardInterrupt that other code raises."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """A context in which `came` says whether SIGINT has arrived; the handler that was there before still runs.

    Python calls handlers in the main thread alone: in other threads, and where SIGINT is ignored, `came` stays False.
    """

    def __init__(self) -> None:
        self.came = False
        self._previous: Any = None

    def __enter__(self) -> Interrupts:
        previous = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is threading.main_thread() and callable(previous):
            self._previous = previous
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        self._previous(number, frame)
