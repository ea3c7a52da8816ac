"""Many runs of many places: the state now, the state before, and the shifts of times.

Results are comparable within a place: a row of the CI matrix if records name one, else the hardware and its versions.
The state of a place is its newest run, with the earlier runs of the same commit that share no case with it (shards,
other backends). A shard that runs again, with exactly the same cases, replaces the earlier one.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from harness.results.file import Record
from harness.results.reader import seconds
from harness.results.verdict import NOT_EXECUTED

Item = tuple[str, str, str]  #: family, backend, case
VERSIONS = ("python", "torch", "triton", "cuda")

ALPHA = 0.05  #: false discoveries among the marked shifts of a report
MIN_CHANGE = 0.02  #: smaller shifts are never marked
MIN_RUNS = 4  #: the least number of runs on either side of a shift
TRIM = 0.1  #: the share of outliers: runs left out at either end, on either side of a shift


@dataclass(frozen=True, order=True)
class Place:
    """Runs of one place can be compared."""

    name: str  #: the row of the matrix, or the hardware
    device: str
    versions: str = ""  #: "" if a row names the place: its history continues through updates

    @classmethod
    def from_record(cls, record: Record) -> Place:
        """The place where a record was made."""
        environment = record.get("environment") or {}
        if row := record.get("row"):
            return cls(str(row), record["device"])
        name = environment.get("device_name") or environment.get("host") or "unknown machine"
        versions = ", ".join(f"{v} {environment[v]}" for v in VERSIONS if v in environment)
        return cls(str(name), record["device"], versions)


@dataclass
class Run:
    """One run at one place."""

    name: str
    place: Place
    started: float  #: seconds since 1970; 0: unknown
    commit: str
    records: dict[Item, Record] = field(default_factory=dict)
    ended: float = 0.0

    @property
    def counts(self) -> Counter[str]:
        return Counter(r["status"] for r in self.records.values())


def runs(records: Iterable[Record]) -> list[Run]:
    """The runs, oldest first. A run on two devices is a run at each."""
    by_name: dict[tuple[str, Place], Run] = {}
    for record in records:
        name, place = str(record.get("run", "")), Place.from_record(record)
        if (name, place) not in by_name:
            by_name[name, place] = Run(name, place, seconds(name.split(" ")[0]), str(record.get("commit", "unknown")))
        run = by_name[name, place]
        run.records[item(record)] = record
        run.ended = max(run.ended, seconds(str(record.get("time", ""))))
    return sorted(by_name.values(), key=lambda run: (run.started, run.name))


def item(record: Record) -> Item:
    """The family, backend and case of a record."""
    return str(record.get("family", "")), record["backend"], record["case"]


# -- the state --------------------------------------------------------------------------------------------------------
@dataclass
class PlaceState:
    """The newest record of every case at a place, in runs that belong together, and the state before."""

    place: Place
    runs: list[Run]
    before: PlaceState | None = None

    @property
    def records(self) -> dict[Item, Record]:
        return {key: record for run in self.runs for key, record in run.records.items()}


def states(runs: list[Run]) -> dict[Place, PlaceState]:
    """The state of every place. runs: the oldest first."""
    now: dict[Place, PlaceState] = {}
    for run in runs:
        state = now.get(run.place)
        kept = None if state is None or state.runs[-1].commit != run.commit else _kept(state.runs, run)
        if state is None or kept is None:
            now[run.place] = PlaceState(run.place, [run], state)
        elif len(kept) == len(state.runs):
            state.runs.append(run)
        else:
            now[run.place] = PlaceState(run.place, [*kept, run], state)
    return now


def _kept(group: list[Run], run: Run) -> list[Run] | None:
    """The runs of the group that stay in one state with the run; None if the run begins another state.

    All stay if the run shares no case with them; all but one if it repeats exactly that one.
    """
    sharing = [old for old in group if old.records.keys() & run.records.keys()]
    if not sharing:
        return group
    if len(sharing) == 1 and sharing[0].records.keys() == run.records.keys():
        return [old for old in group if old is not sharing[0]]
    return None


def executed_less(state: PlaceState) -> list[tuple[str, str, int, int]]:
    """(backend, family, executed now, executed before), where fewer cases ran than in the last state that ran any."""
    before: dict[tuple[str, str], int] = {}
    older = state.before
    while older is not None:
        before = dict(_executed(older)) | before
        older = older.before
    now = _executed(state)
    return [(*key, now[key], n) for key, n in sorted(before.items()) if now[key] < n]


def _executed(state: PlaceState) -> Counter[tuple[str, str]]:
    return Counter(
        (backend, family)
        for (family, backend, _), record in state.records.items()
        if record["status"] not in NOT_EXECUTED
    )


# -- shifts -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Shift:
    """A change of the level of a series."""

    at: int  #: the first value of the new level
    ratio: float  #: median after / median before, between the neighbouring shifts
    p: float  #: p-value, corrected for the number of possible places


def shifts(series: list[list[float]]) -> list[list[Shift]]:
    """The shifts of each series of positive times, oldest first; most series have none.

    A series is cut where the ranks of its sides differ most (Pettitt 1979), and each part again, as long as MIN_RUNS
    remain on either side. Yuen's t-test of log time, trimmed by TRIM (scipy.stats.ttest_ind with trim), compares
    neighbouring parts; its p-value is multiplied by the number of possible cuts (Bonferroni). The two parts that differ
    least are joined until all differ. A shift is marked if it is a discovery at a false discovery rate of ALPHA over
    all series (Benjamini and Hochberg 1995) and at least MIN_CHANGE large.
    """
    logs = [np.log(np.asarray(values, dtype=float)) for values in series]
    cuts = [_cuts(log) for log in logs]
    tested: list[tuple[int, int, float]] = []
    pending = [n for n, found in enumerate(cuts) if found]
    while pending:
        sides = [(n, a, c, b) for n in pending for a, c, b in _neighbours(cuts[n], len(logs[n]))]
        found: dict[int, list[tuple[float, int]]] = defaultdict(list)
        for (n, _, c, _), p in zip(sides, _p_values([(logs[n][a:c], logs[n][c:b]) for n, a, c, b in sides])):
            found[n].append((min(1.0, p * (len(logs[n]) - 2 * MIN_RUNS + 1)), c))
        pending = []
        for n, judged in found.items():
            p, least = max(judged)
            if p <= ALPHA:
                tested += [(n, c, p) for p, c in judged]
            elif len(judged) == 1:
                tested.append((n, least, p))
            else:
                cuts[n].remove(least)
                pending.append(n)
    return _marked(logs, tested)


def _neighbours(cuts: list[int], length: int) -> list[tuple[int, int, int]]:
    """(start, cut, end) of the parts on either side of each cut."""
    ends = [0, *cuts, length]
    return list(zip(ends, ends[1:], ends[2:]))


def _cuts(values: np.ndarray, start: int = 0) -> list[int]:
    """Every possible place of a shift, in order."""
    n = len(values)
    if n < 2 * MIN_RUNS:
        return []
    places = np.arange(MIN_RUNS, n - MIN_RUNS + 1)
    ordered = np.sort(values)
    twice = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right") + 1  # the mean of ties
    ranks = np.cumsum(twice / 2)[places - 1]
    unlike = np.abs(2 * ranks - places * (n + 1)) / np.sqrt(places * (n - places))
    cut = int(places[unlike.argmax()])
    return [*_cuts(values[:cut], start), start + cut, *_cuts(values[cut:], start + cut)]


def _p_values(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """One p-value for each (before, after). Pairs of equal lengths share a call of scipy, which costs the same."""
    from scipy import stats

    found = [1.0] * len(pairs)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for n, (before, after) in enumerate(pairs):
        alike[len(before), len(after)].append(n)
    for members in alike.values():
        before, after = (np.stack([pairs[n][side] for n in members]) for side in (0, 1))
        with warnings.catch_warnings():  # without scatter p is 0, or NaN if all values are equal
            warnings.simplefilter("ignore", RuntimeWarning)
            p = stats.ttest_ind(before, after, axis=1, equal_var=False, trim=TRIM).pvalue
        same = np.median(before, axis=1) == np.median(after, axis=1)
        for n, value in zip(members, np.where(same, 1.0, np.nan_to_num(p, nan=0.0))):
            found[n] = float(value)
    return found


def _marked(logs: list[np.ndarray], tested: list[tuple[int, int, float]]) -> list[list[Shift]]:
    certain: dict[int, dict[int, float]] = defaultdict(dict)
    adjusted: Sequence[float] = ()
    if tested:
        from scipy import stats

        adjusted = stats.false_discovery_control([p for *_, p in tested])
    for (n, cut, p), level in zip(tested, adjusted):
        if level <= ALPHA:
            certain[n][cut] = p
    found: list[list[Shift]] = [[] for _ in logs]
    for n, cuts in certain.items():
        for a, cut, b in _neighbours(sorted(cuts), len(logs[n])):
            ratio = float(np.exp(np.median(logs[n][cut:b]) - np.median(logs[n][a:cut])))
            if abs(ratio - 1) >= MIN_CHANGE:
                found[n].append(Shift(cut, ratio, cuts[cut]))
    return found
