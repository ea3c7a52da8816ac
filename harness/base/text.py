"""Numbers and lines for a reader."""

from __future__ import annotations

WIDTH = 120


def share(budget: float) -> str:
    """A share of the budget in at most five characters."""
    if budget < 100:
        return f"{budget:.2f}"
    return f"{budget:.0f}" if budget < 1e4 else "inf" if budget == float("inf") else f"{budget:.0e}".replace("+", "")


def number(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s"


def cut(line: str, width: int = WIDTH) -> str:
    """One line, of at most this width."""
    line = " ".join(line.splitlines())
    return line if len(line) <= width else line[: width - 3] + "..."
