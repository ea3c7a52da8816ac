"""Numbers and lines for a reader."""

from __future__ import annotations

WIDTH = 120


def share(budget: float) -> str:
    """A share of the error budget in at most five characters."""
    if budget < 100:
        return f"{budget:.2f}"
    return f"{budget:.0f}" if budget < 1e4 else "inf" if budget == float("inf") else f"{budget:.0e}".replace("+", "")


def number(count: int, thing: str) -> str:
    """ "1 case", "2 cases"."""
    return f"{count} {thing}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """ "12.3 s", or "2 min 31 s" from 100 s on."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s"


def cut(line: str, width: int = WIDTH) -> str:
    """Text as one line, cut to the width."""
    line = " ".join(line.splitlines())
    return line if len(line) <= width else line[: width - 3] + "..."
