"""The page's times: every timed case against the roofline of its device, and its times over the runs."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from statistics import median
from typing import Any

from harness.report import history
from harness.report.history import Item, Place, Record, Run

NUMBERS = ("device_us", "host_us", "compile_seconds", "bytes", "flops", "bytes_per_s", "flops_per_s", "floor_us")
#: The conditions of a timing.
CONDITIONS = ("configurations", "clocks", "method", "operand")

Row = tuple[Place, Item, Record]


def timed(record: Record) -> dict[str, Any] | None:
    """The record's "perf" if it holds a time, otherwise None."""
    perf = record.get("perf")
    us = _finite(perf.get("device_us")) if isinstance(perf, dict) else None
    return perf if us is not None and us > 0 else None


def roof_share(perf: dict[str, Any]) -> float | None:
    """The least time that the measured ceilings allow / the measured time; None if the ceilings are unknown."""
    floor = _finite(perf.get("floor_us"))
    if floor is None:
        ceilings = perf.get("ceilings") or {}
        copy = _finite(ceilings.get("copy_bytes_per_s"))
        rate = _finite((ceilings.get("flops_per_s") or {}).get(perf.get("operand")))
        moved, computed = _finite(perf.get("bytes")), _finite(perf.get("flops"))
        if not copy or not rate or moved is None or computed is None:
            return None
        floor = 1e6 * max(moved / copy, computed / rate)
    return floor / perf["device_us"]


def perf(rows: list[Row]) -> dict[str, Any]:
    """Columns of the timed rows; each distinct ceiling and condition is once in `tables`."""
    columns: dict[str, list[Any]] = {name: [] for name in ("row", "share", "ceilings", *NUMBERS, *CONDITIONS)}
    tables: dict[str, dict[str, int]] = {name: {} for name in ("ceilings", *CONDITIONS)}
    for n, (_, _, record) in enumerate(rows):
        if (timing := timed(record)) is None:
            continue
        columns["row"].append(n)
        columns["share"].append(_short(roof_share(timing)))
        for name in NUMBERS:
            columns[name].append(_short(timing.get(name)))
        for name, table in tables.items():
            text = json.dumps(timing.get(name), sort_keys=True)
            columns[name].append(table.setdefault(text, len(table)))
    return {**columns, "tables": {name: [json.loads(text) for text in table] for name, table in tables.items()}}


def series(rows: list[Row], runs: list[Run]) -> list[dict[str, Any]]:
    """The device times over the runs, in microseconds, of every case of the state that was timed at least twice.

    runs: indices into `runs`; newest: the newest time / the median of the earlier ones; shifts: see history.shifts.
    """
    over: dict[tuple[Place, Item], list[tuple[int, Record]]] = defaultdict(list)
    for n, run in enumerate(runs):
        for key, record in run.records.items():
            if timed(record):
                over[run.place, key].append((n, record))
    chosen = [(n, over[place, key]) for n, (place, key, _) in enumerate(rows) if len(over.get((place, key), ())) > 1]
    times = [[record["perf"]["device_us"] for _, record in points] for _, points in chosen]
    return [
        {
            "row": row,
            "runs": [n for n, _ in points],
            "us": [_short(value) for value in us],
            "newest": _short(us[-1] / median(us[:-1])),
            "shifts": [
                {"at": s.at, "ratio": _short(s.ratio), "p": s.p, "with": _changed(points[s.at - 1][1], points[s.at][1])}
                for s in found
            ],
        }
        for (row, points), us, found in zip(chosen, times, history.shifts(times))
    ]


def _changed(before: Record, after: Record) -> list[str]:
    """The conditions that changed with the level, in words."""
    old, new = _conditions(before), _conditions(after)
    return [f"{name} {_difference(old[name], new[name])}" for name in old if old[name] != new[name]]


def _conditions(record: Record) -> dict[str, str]:
    """Conditions that may explain a shift. Not the clocks: they always differ a little."""
    timing, environment = record["perf"], record.get("environment") or {}
    known = {name: timing.get(name) for name in CONDITIONS if name != "clocks"}
    known["configurations"] = "; ".join(timing.get("configurations") or [])
    known["driver"] = (timing.get("clocks") or {}).get("driver_version")
    known |= {name: environment.get(name) for name in history.VERSIONS}
    return {name: str(value or "unknown") for name, value in known.items()}


def _difference(old: str, new: str) -> str:
    """The words that differ, if both texts have equally many; otherwise both texts."""
    words = list(zip(old.split(), new.split()))
    if len(old.split()) != len(new.split()):
        words = [(old, new)]
    return ", ".join(f"{a} -> {b}" for a, b in words if a != b)


def _finite(value: Any) -> float | None:
    return value if type(value) in (int, float) and math.isfinite(value) else None


def _short(value: Any) -> float | None:
    number = _finite(value)
    return None if number is None else float(f"{number:.5g}")
