"""The progress of a run over the mutants, and its interruption by a signal."""

from __future__ import annotations

import os
import sys
import time
from typing import Any


class Progress:
    """Shows one line that is rewritten on a terminal; elsewhere one line for each mutant."""

    def __init__(self, total: int, done: int) -> None:
        self._total, self._done, self._before = total, done, done
        self._started = time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._interrupted = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def interrupt(self, *_: Any) -> None:
        """Handle a signal: the next `watch` raises KeyboardInterrupt.

        Raised during a fork it would be lost. The second signal raises it at once.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True

    def watch(self, names: list[str]) -> None:
        """Show the progress and the running entries. KeyboardInterrupt after a signal."""
        if self._interrupted:
            raise KeyboardInterrupt
        if not self._terminal:
            return
        full = 24 * self._done // self._total
        new = self._done - self._before
        left = f", {self.seconds / new * (self._total - self._done) / 60:.0f} min left" if new > 2 else ""
        text = f"[{'#' * full}{'.' * (24 - full)}] {self._done}/{self._total}{left}: {', '.join(names)}"
        print(f"\r\033[K{text[: os.get_terminal_size().columns - 1]}", end="", flush=True)

    def done(self, line: str) -> None:
        """Count one more mutant, and print its line."""
        self._done += 1
        self.clear()
        print(line, flush=True)

    def clear(self) -> None:
        """Remove the progress line."""
        if self._terminal:
            print("\r\033[K", end="", flush=True)
