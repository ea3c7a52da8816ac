"""The lines that `moe-harness structure` prints."""

from __future__ import annotations

from typing import Any

from harness.base import table
from harness.perf.count.baseline import BaselineCheck
from harness.perf.count.structure import CallCounts
from harness.perf.metrics import METRICS


def check_lines(check: BaselineCheck) -> list[str]:
    """What is not compared and why, the changes by case, and the totals."""
    lines = [f"not compared: {what}" for what in check.not_compared]
    for key, changes in check.changes.items():
        lines += ["", key, *(f"  {change}" for change in changes)]
    if check.changes:
        lines.append("")
    if not check.compared and not check.changes:
        lines.append("nothing could be compared")
    changed = len(check.changes)
    kernels = f", {check.kernels} compiled kernels" if check.kernels else ""
    return [*lines, f"{check.compared} cases{kernels}: {f'{changed} changed' if changed else 'nothing changed'}"]


def counts_lines(counts: CallCounts) -> list[str]:
    """All counts of one case: the metrics, the lists behind them, and the numbers of the compiled kernels."""
    metrics = [(name, str(value), METRICS[name].counts) for name, value in counts.metrics.items()]
    lines = table.aligned(metrics, {1}, indent=2, widths=(16, 7))
    for title, values in (
        ("launched", counts.kernels),
        ("allocated", counts.allocations),
        ("waits", _count_lines(counts.waits)),
        ("copies", _count_lines(counts.copies)),
        ("operators", _count_lines(counts.operators)),
        ("Python functions", _count_lines(counts.functions)),
    ):
        lines += ["", title, *(f"  {value}" for value in values)] if values else []
    for kernel, targets in counts.compiled.items():
        lines += ["", kernel]
        numbers = [
            (target, ", ".join(f"{k} {_short(v)}" for k, v in found.items())) for target, found in targets.items()
        ]
        lines += table.labelled(numbers, width=8)
    return lines


def _count_lines(counts: dict[str, int]) -> list[str]:
    return [f"{count:4} {name}" for name, count in counts.items()]


def _short(value: Any) -> str:
    return " ".join(f"{k}:{v}" for k, v in value.items()) or "none" if isinstance(value, dict) else str(value)
