"""The page's data, aggregated, in columns, ready for JSON: no table or text occurs twice."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from harness.base.text import number
from harness.problem import words
from harness.report import history, performance
from harness.report.history import Item, Place, PlaceState, Run
from harness.results.file import Record
from harness.results.verdict import FAILED, JUDGED, STATISTICS, STATUSES

TEXTS = 12_000_000  #: characters of failures' reports and error maps in a page, at most
TEXT = 20_000  #: characters of one report
BINS = 20  #: of the budget from 0 to 1
GROUPS = 200  #: reasons that are listed, at most
NUMBERS = (int, float)
LETTERS = dict(zip(STATUSES, "pfmuchk"))
STALE = 7 * 86400  #: seconds before the newest run from which a place gets a warning

Row = tuple[Place, Item, Record]


def payload(
    records: list[Record], remarks: list[str], title: str, made: str, problems: Iterable[str] = ()
) -> dict[str, Any]:
    """The page's data. remarks, problems: those of the merge; made: when the page is made, as text."""
    runs = history.runs(records)
    states = sorted(history.states(runs).values(), key=lambda state: state.place)
    rows: list[Row] = [(s.place, key, record) for s in states for key, record in sorted(s.records.items())]
    texts = Texts(rows)
    return {
        "title": title,
        "made": made,
        "remarks": remarks + texts.remarks,
        "warnings": [*problems, *stale(states), *tested_less(states)],
        "places": [_place(state) for state in states],
        "runs": [_run(run, states) for run in runs],
        "statuses": list(STATUSES),
        "cases": Columns(rows, states, runs).content(),
        "texts": texts.reports,
        "maps": texts.maps,
        "matrix": matrix(rows, states),
        "not_run": not_run(rows),
        "reasons": reasons(rows),
        "histograms": histograms(rows, states),
        "perf": performance.perf(rows),
        "series": performance.series(rows, runs),
        "rule": {
            "alpha": history.ALPHA, "least": history.MIN_CHANGE, "runs": history.MIN_RUNS, "trim": history.TRIM,
        },
        "statistics": {**STATISTICS, "equal": "outputs that differ", "class": "NaN and infinities out of place"},
        "words": words.meanings(sorted({token for _, (_, _, case), _ in rows for token in case.split("-")})),
        "defaults": words.defaults(),
    }  # fmt: skip


# -- places, runs, warnings -------------------------------------------------------------------------------------------
def _place(state: PlaceState) -> dict[str, Any]:
    newest = state.runs[-1]
    return {
        "name": state.place.name,
        "device": state.place.device,
        "versions": state.place.versions or _versions(newest),
        "commit": newest.commit,
        "started": min(run.started for run in state.runs),
        "ended": max(run.ended for run in state.runs),
        "runs": len(state.runs),
        "counts": Counter(r["status"] for r in state.records.values()),
        "turned_red": [] if state.before is None else _turned(state),
    }


def _versions(run: Run) -> str:
    environment = next(iter(run.records.values())).get("environment") or {}
    return ", ".join(f"{v} {environment[v]}" for v in history.VERSIONS if v in environment)


def _turned(state: PlaceState) -> list[list[str]]:
    """[family, backend, case] of the cases that are red and were not red in the state before."""
    assert state.before is not None
    before = state.before.records
    return [
        list(key)
        for key, record in state.records.items()
        if record["status"] in FAILED and key in before and before[key]["status"] not in FAILED
    ]


def _run(run: Run, states: list[PlaceState]) -> dict[str, Any]:
    return {
        "place": next(n for n, state in enumerate(states) if state.place == run.place),
        "started": run.started,
        "seconds": max(0.0, run.ended - run.started) if run.started and run.ended else None,
        "commit": run.commit,
        "counts": run.counts,
    }


def stale(states: list[PlaceState]) -> list[str]:
    """A line for every place that last ran more than STALE before the newest run."""
    newest = max((state.runs[-1].started for state in states), default=0.0)
    return [
        f"{label(state.place)} last ran {number(int(late // 86400), 'day')} before the newest run"
        for state in states
        if (late := newest - state.runs[-1].started) > STALE
    ]


def tested_less(states: list[PlaceState]) -> list[str]:
    """A line for every backend at a place that executed fewer cases of a family than in the state before."""
    lines = []
    for state in states:
        less: dict[str, list[str]] = defaultdict(list)
        for backend, family, now, before in history.executed_less(state):
            less[backend].append(f"{family} {now} instead of {before}")
        lines += [
            f"{backend} at {label(state.place)} executed fewer cases than before: {', '.join(families)}"
            for backend, families in less.items()
        ]
    return lines


def label(place: Place) -> str:
    """The name of a place for a reader."""
    device = place.device.replace(" (emulated)", ", emulated")
    return device if place.name == place.device else f"{place.name} ({device})"


# -- the cases in columns ---------------------------------------------------------------------------------------------
class Strings:
    """A table of distinct strings; `add` returns a string's index."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def add(self, text: str) -> int:
        return self.places.setdefault(text, len(self.places))


class Columns:
    """One value for each row and column; a string is an index into the table with the name of its column."""

    def __init__(self, rows: list[Row], states: list[PlaceState], runs: list[Run]) -> None:
        self.tables: dict[str, Strings] = defaultdict(Strings)
        self.columns: dict[str, list[Any]] = defaultdict(list)
        self.sparse: dict[str, dict[str, list[Any]]] = {"budgets": {}, "trace": {}}
        place_of = {state.place: n for n, state in enumerate(states)}
        letters = past(runs)
        for n, (place, key, record) in enumerate(rows):
            self._row(n, place_of[place], record, letters[place, key])
        for group in self.sparse.values():
            for column in group.values():
                column += [None] * (len(rows) - len(column))

    def _row(self, n: int, place: int, record: Record, letters: str) -> None:
        put = self.columns
        put["place"].append(place)
        put["status"].append(STATUSES.index(record["status"]))
        put["budget"].append(share(record.get("budget")))
        put["seconds"].append(rounded(record.get("seconds")))
        put["calls"].append(record.get("calls") or 0)
        for name in ("case", "backend", "family", "reason", "statistic", "plan"):
            put[name].append(self.tables[name].add(str(record.get(name, ""))))
        line = str(record.get("reproduce", ""))
        # The case is in its own column: the rest is equal for all cases of a backend and device.
        put["reproduce"].append(self.tables["reproduce"].add(line.replace(record["case"], "\0", 1)))
        put["history"].append(self.tables["history"].add(letters))
        trace = dict(record.get("trace") or {})
        counted = Counter(trace.pop("launches", None) or [])
        launches = ", ".join(name + (f" x{times}" if times > 1 else "") for name, times in counted.items())
        put["launches"].append(self.tables["launches"].add(launches))
        for name, used in (record.get("budgets") or {}).items():
            self._put("budgets", name, n, share(used))
        for name, value in trace.items():
            if type(value) in NUMBERS:
                self._put("trace", name, n, value)

    def _put(self, group: str, name: str, n: int, value: Any) -> None:
        column = self.sparse[group].setdefault(name, [])
        column += [None] * (n - len(column))
        column.append(value)

    def content(self) -> dict[str, Any]:
        tables = {name: list(table.places) for name, table in self.tables.items()}
        return {"tables": tables, **self.columns, **self.sparse}


def past(runs: list[Run]) -> dict[tuple[Place, Item], str]:
    """{(place, item): one letter of LETTERS for each of its runs, oldest first}."""
    letters: dict[tuple[Place, Item], str] = defaultdict(str)
    for run in runs:
        for key, record in run.records.items():
            letters[run.place, key] += LETTERS[record["status"]]
    return letters


def share(used: Any) -> float | str | None:
    """A share of the budget to three digits; "inf" stays "inf"."""
    return used if used in ("inf", None) else rounded(used)


def rounded(value: Any) -> float | None:
    """A finite number to three digits, otherwise None."""
    if type(value) not in NUMBERS or not math.isfinite(value):
        return None
    short = float(f"{value:.3g}")
    return int(short) if short == int(short) else short


class Texts:
    """Reports and error maps of failures, as many as fit: the first of each family and backend before the second."""

    def __init__(self, rows: list[Row]) -> None:
        self.reports: dict[int, str] = {}
        self.maps: dict[int, Any] = {}
        self.remarks: list[str] = []
        turn: Counter[tuple[Any, ...]] = Counter()
        waiting = []
        for n, (place, (family, backend, _), record) in enumerate(rows):
            if record["status"] in FAILED and (record.get("report") or record.get("error_map")):
                waiting.append((turn[place, family, backend], n, record))
                turn[place, family, backend] += 1
        left, left_out = TEXTS, 0
        for _, n, record in sorted(waiting, key=lambda entry: entry[:2]):
            report, error_map = str(record.get("report") or ""), record.get("error_map")
            size = min(len(report), TEXT) + (len(json.dumps(error_map)) if error_map else 0)
            if size > left:
                left_out += 1
                continue
            left -= size
            if report:
                cut = f"\n... {len(report) - TEXT} characters more" if len(report) > TEXT else ""
                self.reports[n] = report[:TEXT] + cut
            if error_map:
                self.maps[n] = error_map
        if left_out:
            self.remarks.append(
                f"{number(left_out, 'report')} of failures left out of this page, which would be too large: their "
                "reproduction lines are here"
            )


# -- tables -----------------------------------------------------------------------------------------------------------
def matrix(rows: list[Row], states: list[PlaceState]) -> list[dict[str, Any]]:
    """A cell for every place, backend and family with records."""
    place_of = {state.place: n for n, state in enumerate(states)}
    cells: dict[tuple[int, str, str], list[Record]] = defaultdict(list)
    for place, (family, backend, _), record in rows:
        cells[place_of[place], backend, family].append(record)
    return [
        {"place": place, "backend": backend, "family": family, **cell(found)}
        for (place, backend, family), found in sorted(cells.items(), key=lambda entry: entry[0])
    ]


def cell(records: Iterable[Record]) -> dict[str, Any]:
    """Verdicts by status, and the worst share of the budget of the judged ones (None if there are none)."""
    records = list(records)
    judged = [float(r.get("budget") or 0.0) for r in records if r["status"] in JUDGED]
    worst = max(judged, default=None)
    return {
        "counts": Counter(r["status"] for r in records),
        "worst": "inf" if worst == float("inf") else rounded(worst),
    }


def not_run(rows: list[Row]) -> list[dict[str, Any]]:
    """Reasons of unsupported cases by keyword, the most frequent first; every text with its backend and count."""
    found: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    for _, (_, backend, _), record in rows:
        if record["status"] == "unsupported":
            keyword, _, text = str(record.get("reason", "")).partition(":")
            found[keyword][text.strip(), backend] += 1
    return [
        {
            "keyword": keyword,
            "count": sum(texts.values()),
            "texts": [[text, backend, n] for (text, backend), n in texts.most_common(GROUPS)],
        }
        for keyword, texts in sorted(found.items(), key=lambda entry: (-sum(entry[1].values()), entry[0]))
    ]


def reasons(rows: list[Row]) -> list[dict[str, Any]]:
    """Red, mistrusted and known verdicts by reason, its numbers aside; red first, then the most frequent."""
    found: dict[tuple[bool, str, str], list[int]] = defaultdict(list)
    for n, (_, _, record) in enumerate(rows):
        status = record["status"]
        if status in FAILED or status in ("mistrusted", "known"):
            text = record.get("known") or re.sub(r"\d+(\.\d+)?", "#", str(record.get("reason", "")))
            found[status not in FAILED, status, text].append(n)
    ordered = sorted(found.items(), key=lambda entry: (entry[0][0], -len(entry[1]), entry[0]))
    return [
        {
            "status": status,
            "count": len(places),
            "row": places[0],
            "backends": Counter(rows[n][1][1] for n in places),
            "families": Counter(rows[n][1][0] for n in places),
        }
        for (_, status, _), places in ordered[:GROUPS]
    ]


def histograms(rows: list[Row], states: list[PlaceState]) -> list[dict[str, Any]]:
    """Histograms of the share of the budget, for every place and backend: BINS equal bins from 0 to 1, one for more.

    Only cases judged statistically: the share of an exact case is 0 or infinite.
    """
    place_of = {state.place: n for n, state in enumerate(states)}
    found: dict[tuple[int, str], list[int]] = defaultdict(lambda: [0] * (BINS + 1))
    for place, (_, backend, _), record in rows:
        if record["status"] in JUDGED and record.get("statistic") not in ("equal", "", None):
            used = float(record.get("budget") or 0.0)
            found[place_of[place], backend][BINS if used > 1 else min(BINS - 1, int(used * BINS))] += 1
    return [
        {"place": place, "backend": backend, "bins": bins} for (place, backend), bins in sorted(found.items())
    ]  # fmt: skip
