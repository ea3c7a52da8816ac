"""The table at the end of a run: pure functions from verdict records to lines of plain text, 120 columns wide."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from harness.base.text import WIDTH, cut, duration, number, share
from harness.results.verdict import FAILED, JUDGED

LEGEND = "A cell: passed/failed+crashed+hung/mistrusted/unsupported, largest share of the error budget (above 1 fails)."
LEGEND_KNOWN = "A fifth number: known failures (cases/ledger.toml), which failed as they are known to."

Record = dict[str, Any]


@dataclass(frozen=True)
class Missing:
    """A backend that could not be used on a device, why, and how many cases were not run for that."""

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
    """The whole summary: what it was, the table, the lists, and the totals last. `short` leaves out the families, the
    reasons for not running and most of the lists."""
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
    """Every backend on every device against every family, folded to the width."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        groups[_who(record), record["family"] if by_family else "all families"].append(record)
    rows = sorted({_who(r) for r in records}, key=lambda who: who.rpartition("@")[::-1])
    columns = sorted({family for _, family in groups})
    label = max(map(len, rows))
    lines, shown = [], list(columns)
    while shown:
        fold: list[str] = []
        room = width - label
        while shown and (not fold or room >= _column_width(groups, rows, shown[0])):
            room -= _column_width(groups, rows, shown[0])
            fold.append(shown.pop(0))
        widths = [_column_width(groups, rows, family) for family in fold]

        def line(who: str, texts: Iterable[str], widths: list[int] = widths) -> str:
            return who.ljust(label) + "".join(text.rjust(w) for text, w in zip(texts, widths))

        lines.append(line("", fold))
        lines += [line(who, (cell(groups.get((who, family), [])) for family in fold)) for who in rows]
        lines += [""] if shown else []
    return [*lines, LEGEND, *([LEGEND_KNOWN] if any(r["status"] == "known" for r in records) else [])]


def _column_width(groups: dict[tuple[str, str], list[Record]], rows: list[str], family: str) -> int:
    return 3 + max(len(family), *(len(cell(groups.get((who, family), []))) for who in rows))


def cell(records: list[Record]) -> str:
    """118/0/2/40 0.83: counts, and the largest share of the budget ("-": nothing was judged); "-" for no records.

    A fifth count is that of known failures, if there are any."""
    if not records:
        return "-"
    counts = Counter(r["status"] for r in records)
    failed = sum(counts[status] for status in FAILED)
    numbers = f"{counts['passed']}/{failed}/{counts['mistrusted']}/{counts['unsupported']}"
    numbers += f"/{counts['known']}" if counts["known"] else ""
    judged = [float(r["budget"]) for r in records if r["status"] in JUDGED]
    return f"{numbers} {share(max(judged)) if judged else '-'}"


def totals(records: list[Record], seconds: float = 0.0) -> list[str]:
    """What ran, and what did not: an unsupported verdict is none that was executed."""
    counts = Counter(r["status"] for r in records)
    parts = [f"{counts[s]} {s}" for s in ("passed", "failed", "crashed", "hung", "known", "mistrusted") if counts[s]]
    took = f" in {duration(seconds)}" if seconds else ""
    lines = [f"Executed {number(len(records) - counts['unsupported'], 'verdict')}{took}: {', '.join(parts) or 'none'}."]
    if counts["unsupported"]:
        words = Counter(_keyword(r)[0] for r in records if r["status"] == "unsupported")
        told = ", ".join(f"{n} {word}" for word, n in sorted(words.items(), key=lambda item: (-item[1], item[0])))
        lines.append(cut(f"Not run: {counts['unsupported']} unsupported ({told})."))
    return lines


def not_run(records: list[Record]) -> list[str]:
    """Unsupported cases by the keyword of their reason, with the most frequent reason."""
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record["status"] == "unsupported":
            keyword, text = _keyword(record)
            reasons[keyword][f"{_who(record)}: {text}"] += 1
    if not reasons:
        return []
    ordered = sorted(reasons.items(), key=lambda item: (-item[1].total(), item[0]))
    label, digits = max(map(len, reasons)), len(str(ordered[0][1].total()))
    lines = ["Not run because the backend declares that it does not support the case:"]
    for keyword, found in ordered:
        often = "mostly " if len(found) > 1 else ""
        lines.append(cut(f"  {keyword:{label}} {found.total():{digits}}  {often}{found.most_common(1)[0][0]}"))
    return lines


def unavailable(missing: Iterable[Missing]) -> list[str]:
    lines = [f"  {_at(m.backend, m.device)} missed {number(m.cases, 'case')}: {m.reason}" for m in missing]
    return ["Backends that cannot run here:", *lines] if lines else []


def failures(records: list[Record], most: int) -> list[str]:
    """What failed and the line that runs it again. That line is never cut: it is there to be copied."""
    found = [r for r in records if r["status"] in FAILED]
    lines = []
    for record in found[:most]:
        lines.append(cut(f"  {record['status']}: {_who(record)}: {record['reason']}"))
        lines.append(f"    {record['reproduce']}")
    if len(found) > most:
        lines.append(f"  and {len(found) - most} more")
    return ["Failures:", *lines] if lines else []


def known(records: list[Record]) -> list[str]:
    """What failed as the ledger says, by its entry."""
    entries: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        if record["status"] == "known":
            entries[record["known"]][_who(record)] += 1
    ordered = sorted(entries.items(), key=lambda entry: (-entry[1].total(), entry[0]))
    digits = len(str(ordered[0][1].total())) if ordered else 0
    lines = [cut(f"  {who.total():{digits}}  {', '.join(sorted(who))}: {text}") for text, who in ordered]
    return ["Known failures (cases/ledger.toml), which failed again:", *lines] if lines else []


def mistrusted(records: list[Record], most: int) -> list[str]:
    """Why outputs that matched prove little: each reason once, whatever numbers are in it, with one of its cases."""
    reasons: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["status"] == "mistrusted":
            reasons[re.sub(r"\d+", "0", record["reason"])].append(record)
    ordered = sorted(reasons.values(), key=lambda found: -len(found))
    digits = len(str(len(ordered[0]))) if ordered else 0
    lines = []
    for found in ordered[:most]:
        lines.append(cut(f"  {len(found):{digits}}  {found[0]['reason']}"))
        lines.append(cut(f"  {'':{digits}}  such as {_who(found[0])} {found[0]['case']}"))
    if len(ordered) > most:
        lines.append(f"  and {number(len(ordered) - most, 'more reason')}")
    return ["Mistrusted, since the output proves little although it matched:", *lines] if lines else []


def _keyword(record: Record) -> tuple[str, str]:
    """A declared reason, "<keyword>: text", in its two parts."""
    keyword, _, text = record["reason"].partition(":")
    return keyword, text.strip()


def _who(record: Record) -> str:
    return _at(record["backend"], record["device"])


def _at(backend: str, device: str) -> str:
    return f"{backend}@{device.replace(' (emulated)', '-emulated')}"
