"""Whether the runs of results files are whole: each begins, says what it is going to run, runs it, and ends.

A run that is not whole is a problem, unless later runs at the same place have run all that it had planned.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from harness.base.text import cut, number
from harness.results.file import SCHEMA, Record
from harness.results.reader import seconds
from harness.results.verdict import FAILED

FEW = 3  #: cases that a problem names
MOST = 10  #: runs that are named
ENDED_WELL = (0, 1)  #: exit statuses of pytest: all passed, some failed


@dataclass
class RunRecords:
    """One run: its records, the parts of a run that was continued included."""

    name: str
    row: str = ""
    shard: str = "1/1"
    begins: list[Record] = field(default_factory=list)
    plans: list[Record] = field(default_factory=list)
    ends: list[Record] = field(default_factory=list)
    judged: set[str] = field(default_factory=set)  #: pytest ids of its verdicts
    verdicts: int = 0
    red: int = 0  #: of them, failed
    old: bool = False  #: of schema 1 or 2, which have no plan
    started: float = 0.0  #: seconds since 1970, as `ended`
    ended: float = 0.0
    is_over: bool = False  #: its last part has an end
    problems: list[str] = field(default_factory=list)  #: why it is not whole
    replaced: bool = False  #: it is not whole, but later runs have run all of it

    @property
    def whole(self) -> bool:
        return not self.problems

    @property
    def planned(self) -> set[str]:
        """The pytest ids of its plans."""
        return {nodeid for plan in self.plans for nodeid in nodeids(plan)}

    @property
    def place(self) -> tuple[str, str]:
        """Its row and shard in CI."""
        return self.row, self.shard

    @property
    def scope(self) -> tuple[object, ...]:
        """What selects its cases."""
        begin = self.begins[0] if self.begins else {}
        return (*self.place, begin.get("options"), begin.get("selection"))

    def add(self, record: Record) -> None:
        """Add a record of the run; records come in the order of their times."""
        time = seconds(str(record.get("time", "")))
        self.row, self.shard = str(record.get("row", "")), str(record.get("shard", "1/1"))
        self.started = min(self.started or time, time)
        self.ended = max(self.ended, time)
        if record["kind"] == "verdict":
            self.judged.add(str(record["nodeid"]))
            self.verdicts += 1
            self.red += record["status"] in FAILED
            self.old = record["schema"] < SCHEMA
            return
        kept = {"begin": self.begins, "plan": self.plans, "end": self.ends}[record["kind"]]
        if record not in kept:  # a recovered file has the records a second time
            kept.append(record)
            self.is_over = record["kind"] == "end"


def nodeids(plan: Record) -> Iterator[str]:
    """The pytest ids of a plan's record."""
    for node, every in plan["items"].items():
        for parameters in every:
            yield f"{node}[{parameters}]" if parameters else node


def group(records: Iterable[Record]) -> list[RunRecords]:
    """The runs of these records, the first to begin first, each with its problems."""
    runs: dict[str, RunRecords] = {}
    for record in records:
        name = str(record.get("run", ""))
        runs.setdefault(name, RunRecords(name)).add(record)
    ordered = sorted(runs.values(), key=lambda run: run.started)
    for run in ordered:
        run.problems = list(_problems(run))
    for n, run in enumerate(ordered):
        run.replaced = not run.whole and _is_replaced(run, ordered[n + 1 :])
    return ordered


def _problems(run: RunRecords) -> Iterator[str]:
    """Why a run is not whole."""
    if run.old:
        yield f"schema {SCHEMA - 1} or older: its records do not say how many cases were due"
        return
    planned = run.planned
    missing = planned - run.judged
    if not run.begins:
        yield "its beginning is missing"
    if not run.plans:
        yield "it has no plan: it ended before its cases were collected"
    elif sum(plan["total"] for plan in run.plans[-1:]) != sum(1 for _ in nodeids(run.plans[-1])):
        yield "its plan does not name as many cases as it counts"
    if not run.is_over:
        yield "it has no end: it was killed, or is still running"
    if missing:
        yield f"{len(missing)} of {number(len(planned), 'planned case')} without a verdict: {_named(missing)}"
    exit_code = run.ends[-1]["exit"] if run.is_over else 0
    if exit_code not in ENDED_WELL:
        yield f"pytest ended with {exit_code}"
    elif exit_code == 1 and not run.red and not missing:
        yield "pytest ended with 1, and no verdict is red: an error outside of the cases, or a floor not reached"


def _named(missing: Iterable[str]) -> str:
    """Missing cases in words: counts by backend and family, and the first few."""
    ordered = sorted(missing)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for nodeid in ordered:
        path, _, rest = nodeid.partition("::")
        words = rest.rstrip("]").rsplit(":", 2)
        where = "@".join(words[1:]) if len(words) == 3 else "no backend"
        counts[where][path.rpartition("/")[2].removesuffix(".py").removeprefix("test_")] += 1
    each = [
        f"{where} " + ", ".join(f"{family} {n}" for family, n in _most(by_family))
        for where, by_family in sorted(counts.items(), key=lambda entry: -entry[1].total())[:FEW]
    ]
    more = f" and {len(ordered) - FEW} more" if len(ordered) > FEW else ""
    return cut(f"{'; '.join(each)}: {', '.join(cut(nodeid, 140) for nodeid in ordered[:FEW])}{more}", 600)


def _most(counts: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent entries, and one for all others."""
    kept = counts.most_common(FEW)
    rest = counts.total() - sum(n for _, n in kept)
    return [*kept, *([("others", rest)] if rest else [])]


def _is_replaced(run: RunRecords, later: list[RunRecords]) -> bool:
    """Whether later runs have run all that this one had planned."""
    after = [other for other in later if other.place == run.place and other.is_over and other.plans]
    if not run.plans:
        return any(other.whole and (other.scope == run.scope or not run.begins) for other in after)
    return run.planned <= set().union(*(other.judged for other in after)) if after else False


def remarks(runs: Iterable[RunRecords]) -> list[str]:
    """Lines about the runs that are not whole, but were run again."""
    return _lines([run for run in runs if run.replaced], "; run again since")


def problems(runs: Iterable[RunRecords]) -> list[str]:
    """Lines about the runs that are not whole."""
    return _lines([run for run in runs if not (run.whole or run.replaced)], "")


def _lines(found: list[RunRecords], end: str) -> list[str]:
    """A line for each of the last runs; all runs of an older version have one together."""
    new, old = [run for run in found if not run.old], [run for run in found if run.old]
    lines = [f"and {number(len(new) - MOST, 'run')} more that are not whole{end}"] if len(new) > MOST else []
    for run in new[-MOST:]:
        where = f"{run.row}, shard {run.shard}, " if run.row else ""
        lines.append(f"{where}run {run.name or 'without a name'}: {'; '.join(run.problems)}{end}")
    if old:
        verdicts = number(sum(run.verdicts for run in old), "verdict")
        lines.append(f"{number(len(old), 'run')} of {old[0].problems[0]} ({verdicts}){end}")
    return lines
