"""The tables that `moe-harness compare` prints."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

from harness.base import table
from harness.base.text import number
from harness.perf.compare.compare import Comparison
from harness.perf.compare.statistics import REGRESSED, SAME, UNDECIDED
from harness.perf.metrics import METRICS

WIDTH = 120
HEADING = ("", "BASE", "HEAD", "change", "", "floor", "finds", "samples", "time")
WIDTHS = (16, 10, 10, 26, 10, 6, 6, 8, 6)  #: the least widths of the columns
Groups = list[tuple[tuple[str, str], list[Comparison], str]]


def table_lines(rows: Iterable[Comparison]) -> list[str]:
    """A heading for each case and backend, and below it a line for each metric that changed or is timed."""
    groups = _groups(rows)
    cells = [HEADING, *(_cells(row) for _, shown, _ in groups for row in shown)]
    heading, *metrics = table.aligned(cells, range(1, len(HEADING)), gap=1, indent=2, widths=WIDTHS)
    lines, metric_lines = [heading], iter(metrics)
    for (case, backend), shown, same in groups:
        title = f"{case} on {backend}" + (f": the same in {same}" if same else "")
        lines += textwrap.wrap(title, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for row in shown:
            lines.append(next(metric_lines))
            lines += [f"      {remark}"[:WIDTH] for remark in row.remarks]
    return lines


def markdown_lines(rows: Iterable[Comparison]) -> list[str]:
    """The same as a Markdown table."""
    header = ("case", "backend", "metric", "BASE", "HEAD", "change", "verdict", *HEADING[5:], "remarks")
    lines = []
    for key, shown, same in _groups(rows):
        for row in shown:
            cells = _cells(row)
            cells[4] = f"**{row.outcome}**" if row.outcome == REGRESSED else row.outcome
            lines.append((*key, *cells, "; ".join(row.remarks)))
        if same:
            lines.append((*key, same, "", "", "", SAME, "", "", "", "", ""))
    return table.markdown(header, lines)


def _groups(rows: Iterable[Comparison]) -> Groups:
    """By case and backend: the rows to show one by one, and a summary of the exact metrics that are the same."""
    groups: dict[tuple[str, str], tuple[list[Comparison], list[Comparison]]] = {}
    for row in rows:
        shown, same = groups.setdefault((row.case, row.backend), ([], []))
        (same if row.outcome == SAME and METRICS[row.metric].exact else shown).append(row)
    summaries = []
    for key, (shown, same) in groups.items():
        counted = sum(row.metric != "correct" for row in same)
        parts = ["correctness"] if len(same) > counted else []
        parts += [number(counted, "counted metric")] if counted else []
        summaries.append((key, shown, " and ".join(parts)))
    return summaries


def _cells(row: Comparison) -> list[str]:
    e = row.estimate
    cells = [row.metric, _value(row.base), _value(row.head), "", row.outcome, "", "", "", ""]
    if e and row.detectable is not None:
        cells[3] = f"{_percent(e.change, '+')} % ({_percent(e.low, '+')} to {_percent(e.high, '+')})"
        cells[5], cells[6] = f"{_percent(e.floor)} %", f"{_percent(row.detectable)} %"
        cells[7] = f"{e.generations} x {row.samples // e.generations}"
    elif isinstance(row.base, int) and isinstance(row.head, int):
        cells[3] = f"{row.head - row.base:+d}"
    if row.seconds:
        cells[8] = f"{row.seconds:.0f} s"
    return cells


def _percent(share: float, sign: str = "") -> str:
    """A share in percent, in at most six characters: tenths up to a thousand, a power of ten from 100,000 on."""
    if abs(share) >= 999:
        return f"{100 * share:{sign}.0e}".replace("e+0", "e").replace("e+", "e")
    return f"{100 * share:{sign}.{1 if abs(share) < 9.99 else 0}f}"


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1f} us" if value < 1e6 else f"{value / 1e6:.4g} s"
    return str(value)


def total_lines(rows: list[Comparison], seconds: float) -> list[str]:
    """The totals, the change that the timed metrics would have shown, and the noise floor."""
    counts = Counter(row.outcome for row in rows)
    outcomes = ", ".join(
        f"{counts[o]} {o}" for o in ("regressed", "improved", "undecided", "same", "not compared") if counts[o]
    )
    lines = [f"{len(rows)} metrics in {seconds:.0f} s: {outcomes}."]
    limits = [row.detectable for row in rows if row.detectable is not None and row.outcome in (SAME, UNDECIDED)]
    if limits:
        lines.append(
            f"In {len(limits)} timed as same or undecided, a change of {_percent(max(limits))} % would have been found "
            "with 80 % probability (finds: one by one)."
        )
    floors = [row.estimate.floor for row in rows if row.estimate]
    if floors:
        lines.append(
            f"Noise floor, from BASE against itself: {_percent(min(floors))} to {_percent(max(floors))} %. Intervals: "
            "each bound holds with 95 %."
        )
    return lines
