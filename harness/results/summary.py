"""The summary at the end of a run: pure functions from records to lines of plain text, at most WIDTH columns wide."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from harness.base.table import aligned
from harness.base.text import WIDTH, cut, duration, number, share
from harness.results.file import Record
from harness.results.verdict import FAILED, JUDGED

LEGEND = "A cell: passed/failed+crashed+hung/mistrusted/unsupported, largest share of the error budget (above 1 fails)."
LEGEND_KNOWN = "A fifth number: known failures (cases/ledger.toml), which failed as they are known to."
LONG = 500  #: columns of a line that says how to make a backend run
GAP = 3  #: spaces between two columns of the table


@dataclass(frozen=True)
class Missing:
    """A backend that cannot run on a device, the reason, and how many cases it missed."""

    backend: str
    device: str
    reason: str
    cases: int


def render(
    records: list[Record],
    missing: Iterable[Missing] = (),
    remarks: Iterable[str] = (),
    selection: str = "",
    results: str = "",
    seconds: float = 0.0,
    short: bool = False,
) -> list[str]:
    """The whole summary: remarks and selection, the table, the lists, and the totals last.

    selection: the options that restrict the run, if any; results: the results file, if any; seconds: the duration, if
    known. `short` leaves out the families, the reasons for not running and most of the lists.
    """
    blocks = [list(remarks)]
    if selection:
        blocks[0].append(cut(f"This was a selection ({selection}), not a whole run."))
    if records:
        blocks.append(table(records, by_family=not short))
    blocks += [[] if short else not_run(records), unavailable(missing)]
    blocks += [mistrusted(records, 3 if short else 5), known(records), failures(records, 3 if short else 10)]
    blocks.append((totals(records, seconds) if records else []) + ([f"Results: {results}"] if results else []))
    lines: list[str] = []
    for block in filter(None, blocks):
        lines += ["", *block] if lines and not short else block
    return lines


def table(records: list[Record], by_family: bool = True, width: int = WIDTH) -> list[str]:
    """A row for every backend on every device, a column for every family, folded to the width."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[_place(record), record["family"] if by_family else "all families"].append(record)
    places = sorted({_place(r) for r in records}, key=lambda place: place.rpartition("@")[::-1])
    families = sorted({family for _, family in groups})
    columns = [[family, *(cell(groups.get((place, family), [])) for place in places)] for family in families]
    lines: list[str] = []
    for fold in _folds(columns, width - max(map(len, places))):
        lines += [""] if lines else []
        lines += aligned(zip(["", *places], *fold), right=range(1, len(fold) + 1), gap=GAP)
    return [*lines, LEGEND, *([LEGEND_KNOWN] if any(r["status"] == "known" for r in records) else [])]


def _folds(columns: list[list[str]], width: int) -> list[list[list[str]]]:
    """The columns in groups that fit the width, each with at least one column."""
    folds: list[list[list[str]]] = []
    left = 0
    for column in columns:
        size = GAP + max(map(len, column))
        if not folds or size > left:
            folds.append([])
            left = width
        folds[-1].append(column)
        left -= size
    return folds


def cell(records: list[Record]) -> str:
    """ "118/0/2/40 0.83": counts by status, and the largest share of the budget, "-" if nothing was judged.

    A fifth count is that of known failures, if there are any. "-" for no records.
    """
    if not records:
        return "-"
    counts = Counter(r["status"] for r in records)
    failed = sum(counts[status] for status in FAILED)
    numbers = f"{counts['passed']}/{failed}/{counts['mistrusted']}/{counts['unsupported']}"
    numbers += f"/{counts['known']}" if counts["known"] else ""
    judged = [float(r["budget"]) for r in records if r["status"] in JUDGED]
    return f"{numbers} {share(max(judged)) if judged else '-'}"


def totals(records: list[Record], seconds: float = 0.0) -> list[str]:
    """The number of executed verdicts by status, and of the unsupported ones by keyword."""
    counts = Counter(r["status"] for r in records)
    parts = [f"{counts[s]} {s}" for s in ("passed", "failed", "crashed", "hung", "known", "mistrusted") if counts[s]]
    took = f" in {duration(seconds)}" if seconds else ""
    lines = [f"Executed {number(len(records) - counts['unsupported'], 'verdict')}{took}: {', '.join(parts) or 'none'}."]
    if counts["unsupported"]:
        keywords = Counter(_keyword(r)[0] for r in records if r["status"] == "unsupported")
        ordered = sorted(keywords.items(), key=lambda item: (-item[1], item[0]))
        each = ", ".join(f"{n} {keyword}" for keyword, n in ordered)
        lines.append(cut(f"Not run: {counts['unsupported']} unsupported ({each})."))
    return lines


def not_run(records: list[Record]) -> list[str]:
    """Unsupported cases by the keyword of their reason, each with its most frequent reason."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record["status"] == "unsupported":
            keyword, text = _keyword(record)
            reasons[keyword][f"{_place(record)}: {text}"] += 1
    if not reasons:
        return []
    ordered = sorted(reasons.items(), key=lambda item: (-item[1].total(), item[0]))
    rows = [
        (keyword, str(counts.total()), "mostly " * (len(counts) > 1) + counts.most_common(1)[0][0])
        for keyword, counts in ordered
    ]
    lines = [cut(line) for line in aligned(rows, right={1}, indent=2)]
    return ["Not run because the backend declares that it does not support the case:", *lines]


def unavailable(missing: Iterable[Missing]) -> list[str]:
    """One line for every backend that cannot run on a device."""
    lines = [cut(f"  {_at(m.backend, m.device)} missed {number(m.cases, 'case')}: {m.reason}", LONG) for m in missing]
    return ["Backends that cannot run here:", *lines] if lines else []


def failures(records: list[Record], most: int) -> list[str]:
    """Failures, each with the command that repeats it. That line is never cut: it is there to be copied."""
    failed = [r for r in records if r["status"] in FAILED]
    lines = []
    for record in failed[:most]:
        lines.append(cut(f"  {record['status']}: {_place(record)}: {record['reason']}"))
        lines.append(f"    {record['reproduce']}")
    if len(failed) > most:
        lines.append(f"  and {len(failed) - most} more")
    return ["Failures:", *lines] if lines else []


def known(records: list[Record]) -> list[str]:
    """Known failures by their entry of cases/ledger.toml."""
    entries: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record["status"] == "known":
            entries[record["known"]][_place(record)] += 1
    ordered = sorted(entries.items(), key=lambda entry: (-entry[1].total(), entry[0]))
    rows = [(str(places.total()), f"{', '.join(sorted(places))}: {text}") for text, places in ordered]
    lines = [cut(line) for line in aligned(rows, right={0}, indent=2)]
    return ["Known failures (cases/ledger.toml), which failed again:", *lines] if lines else []


def mistrusted(records: list[Record], most: int) -> list[str]:
    """Vacuous passes: outputs that match and prove little. Each reason once, its numbers aside, with one case."""
    reasons: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["status"] == "mistrusted":
            reasons[re.sub(r"\d+", "0", record["reason"])].append(record)
    ordered = sorted(reasons.values(), key=lambda each: -len(each))
    rows = []
    for each in ordered[:most]:
        rows.append((str(len(each)), each[0]["reason"]))
        rows.append(("", f"such as {_place(each[0])} {each[0]['case']}"))
    lines = [cut(line) for line in aligned(rows, right={0}, indent=2)]
    if len(ordered) > most:
        lines.append(f"  and {number(len(ordered) - most, 'more reason')}")
    return ["Mistrusted, since the output proves little although it matched:", *lines] if lines else []


def _keyword(record: Record) -> tuple[str, str]:
    """A declared reason, "<keyword>: text", as (keyword, text)."""
    keyword, _, text = record["reason"].partition(":")
    return keyword, text.strip()


def _place(record: Record) -> str:
    return _at(record["backend"], record["device"])


def _at(backend: str, device: str) -> str:
    """The backend and device of a row: "triton@cpu"."""
    return f"{backend}@{device.replace(' (emulated)', '-emulated')}"
