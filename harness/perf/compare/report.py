"""The tables that `moe-harness compare` prints."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

from harness.perf.compare.compare import Comparison
from harness.perf.metrics import METRICS

# -- in words ---------------------------------------------------------------------------------------------------------
HEADING = ("", "BASE", "HEAD", "change", "", "floor", "finds", "samples", "time")
WIDTHS = (18, 12, 12, 29, 13, 8, 8, 9, 8)


def table(rows: Iterable[Comparison]) -> list[str]:
    """For people, 120 columns: a line for each case and backend, and for each metric but what is exactly the same."""
    lines = [_line(HEADING)]
    for (case, backend), told, same in _told(rows):
        heading = f"{case} on {backend}" + (f": the same in {same}" if same else "")
        lines += textwrap.wrap(heading, 120, subsequent_indent="  ", break_on_hyphens=False)
        for row in told:
            lines.append(_line(_cells(row)))
            lines += [f"      {remark}"[:120] for remark in row.remarks]
    return lines


def markdown(rows: Iterable[Comparison]) -> list[str]:
    """The same as a table of Markdown."""
    heading = ("case", "backend", "metric", "BASE", "HEAD", "change", "verdict", *HEADING[5:], "remarks")
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|"]
    for (case, backend), told, same in _told(rows):
        tails = [[*_cells(row), "; ".join(row.remarks)] for row in told]
        tails += [[same, "", "", "", "same", "", "", "", "", ""]] if same else []
        for words in tails:
            words[4] = f"**{words[4]}**" if words[4] == "regressed" else words[4]
            escaped = (word.replace("|", "\\|") for word in (case, backend, *words))
            lines.append(f"| {' | '.join(escaped)} |")
    return lines


def _told(rows: Iterable[Comparison]) -> list[tuple[tuple[str, str], list[Comparison], str]]:
    """By case and backend: the rows to be told one by one, and the exact metrics that are the same in a few words."""
    found: dict[tuple[str, str], tuple[list[Comparison], list[Comparison]]] = {}
    for row in rows:
        told, same = found.setdefault((row.case, row.backend), ([], []))
        (same if row.verdict == "same" and METRICS[row.metric].exact else told).append(row)
    words = []
    for key, (told, same) in found.items():
        counted = sum(row.metric != "correct" for row in same)
        parts = ["correctness"] if len(same) > counted else []
        parts += [f"{counted} counted metric{'s' if counted > 1 else ''}"] if counted else []
        words.append((key, told, " and ".join(parts)))
    return words


def _cells(row: Comparison) -> list[str]:
    e = row.estimate
    cells = [row.metric, _value(row.base, row.metric), _value(row.head, row.metric), "", row.verdict, "", "", "", ""]
    if e and row.detectable is not None:
        cells[3] = f"{100 * e.change:+.1f} % ({100 * e.low:+.1f} to {100 * e.high:+.1f})"
        cells[5], cells[6] = f"{100 * e.floor:.1f} %", f"{100 * row.detectable:.1f} %"
        cells[7] = f"{e.generations} x {row.samples // e.generations}"
    elif isinstance(row.base, int) and isinstance(row.head, int):
        cells[3] = f"{row.head - row.base:+d}"
    if row.seconds:
        cells[8] = f"{row.seconds:.0f} s"
    return cells


def _value(value: Any, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:.1f} us" if isinstance(value, float) else str(value)


def _line(cells: Iterable[str]) -> str:
    first, *others = cells
    return (f"  {first:{WIDTHS[0]}}" + "".join(f"{c:>{w}}" for c, w in zip(others, WIDTHS[1:]))).rstrip()


def summed_up(rows: list[Comparison], seconds: float) -> list[str]:
    """The totals, and what the timed part could have found."""
    counts = Counter(row.verdict for row in rows)
    told = ", ".join(
        f"{counts[v]} {v}" for v in ("regressed", "improved", "undecided", "same", "not compared") if counts[v]
    )
    lines = [f"{len(rows)} metrics in {seconds:.0f} s: {told}."]
    limits = [row.detectable for row in rows if row.detectable is not None and row.verdict in ("same", "undecided")]
    if limits:
        lines.append(
            f"In {len(limits)} timed as same or undecided, a change of {100 * max(limits):.1f} % would have been found "
            "with 80 % probability (finds: one by one)."
        )
    floors = [row.estimate.floor for row in rows if row.estimate]
    if floors:
        lines.append(
            f"Noise floor, from BASE against itself: {100 * min(floors):.1f} to {100 * max(floors):.1f} %. Intervals: "
            "each bound holds with 95 %."
        )
    return lines
