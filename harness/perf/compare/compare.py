"""Compare two versions of the kernels: first correctness, then exact metrics, then times.

    request: case, backend, metrics -> verdict on both sides -> exact metrics, once a side -> timed metrics: trials

A case is timed only if it is correct on both sides. Trials are sampled in generations of three processes, until the
statistics decide (perf/compare/statistics.py) or the budget is spent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from harness.perf.compare import statistics
from harness.perf.compare.statistics import IMPROVED, LOOKS, ORDERS, REGRESSED, SAME, SIDES, UNDECIDED, Estimate, Levels
from harness.perf.count.differences import differences
from harness.perf.metrics import METRICS, TARGETS
from harness.perf.versions.checkout import WORKTREE, Checkouts, Worker, WorkerError, first_line
from harness.results.verdict import CORRECT

NOT_COMPARED = "not compared"
ROUNDS = 3  #: of blocks in a generation, each round in all orders: many short blocks, as disturbances come in bursts
BLOCK_SECONDS = 0.02  #: time of the samples of one side in one block
SAMPLES = (3, 20)  #: least and most samples of one side in one block


@dataclass(frozen=True)
class ComparisonRequest:
    """The metrics to compare, by name, for a case (descriptor) on a backend (as --backend names it)."""

    case: str
    backend: str
    metrics: tuple[str, ...]


@dataclass
class Comparison:
    """The result for one metric of a request. Values of the metric "correct" are statuses, others numbers or None."""

    case: str
    backend: str
    metric: str
    outcome: str  #: regressed, improved, same, undecided, not compared
    base: Any = None
    head: Any = None
    remarks: list[str] = field(default_factory=list)
    estimate: Estimate | None = None  #: of a timed metric
    detectable: float | None = None  #: the least relative change that would have been detected
    samples: int = 0  #: of each side
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Ready for JSON, where the outcome has the key "verdict"."""
        return {"verdict" if name == "outcome" else name: value for name, value in asdict(self).items()}


class Side:
    """One version and its worker process. If the process dies, the next request starts a new one."""

    def __init__(self, checkouts: Checkouts, commit: str, device: str) -> None:
        self.checkouts, self.commit, self.device = checkouts, commit, device
        self.environment: dict[str, Any] = {}  #: of the first process that answers
        self._worker: Worker | None = None

    def start(self) -> Worker:
        """The worker, started if there is none."""
        if self._worker is None or not self._worker.alive:
            self._worker = self.checkouts.worker(self.commit, self.device)
        return self._worker

    def ask(self, request: str, **fields: Any) -> dict[str, Any]:
        """The worker's answer, as of Worker.ask."""
        worker = self.start()
        self.environment = self.environment or worker.ask("hello")
        return worker.ask(request, **fields)

    def ready(self) -> None:
        """Wait until the process answers. If it cannot, the next request raises the error."""
        with suppress(WorkerError):
            self.ask("hello")

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@contextmanager
def started(*sides: Side) -> Iterator[None]:
    """Start the processes of all sides at once, and end them with the context."""
    try:
        for side in sides:
            side.start()
        for side in sides:
            side.ready()
        yield
    finally:
        for side in sides:
            side.close()


def compare(
    base: Side,
    head: Side,
    requests: Sequence[ComparisonRequest],
    budget: float,
    threshold: float,
    progress: Callable[[str], None],
) -> list[Comparison]:
    """The comparisons, in the order of the requests.

    budget: seconds from now; no look but the first begins after that. threshold: the relative change of time that
    counts, 0.01 for 1 %. progress: called with a line of progress.
    """
    begun = time.monotonic()
    rows: list[Comparison] = []
    trials: list[Trial] = []
    with started(base, head):
        for number, request in enumerate(requests, 1):
            progress(f"{number} of {len(requests)}: {request.case} on {request.backend}")
            correct, *counted = exact(base, head, request)
            rows += [correct, *counted]
            if correct.base in CORRECT and correct.head in CORRECT:
                timed = [Trial(request, name) for name in request.metrics if not METRICS[name].exact]
                for trial in timed:
                    trial.attempt({"base": base, "head": head}, 0)
                trials += timed
    again = Side(base.checkouts, base.commit, base.device)
    measure(trials, {"base": base, "again": again, "head": head}, begun + budget, threshold, progress)
    places = {(request.case, request.backend): n for n, request in enumerate(requests)}
    return sorted(rows + [trial.row() for trial in trials], key=lambda row: places[row.case, row.backend])


# -- exact ------------------------------------------------------------------------------------------------------------
def exact(base: Side, head: Side, request: ComparisonRequest) -> list[Comparison]:
    """The comparison of "correct", and those of the request's exact metrics if both sides are correct."""
    correct = _correctness(request, *(_status(side, request) for side in (base, head)))
    names = [name for name in request.metrics if METRICS[name].source in ("structure", "compiled")]
    if not names or correct.base not in CORRECT or correct.head not in CORRECT:
        return [correct]
    targets = TARGETS if any(METRICS[name].source == "compiled" for name in names) else ()
    records: list[dict[str, Any] | WorkerError] = []
    for side in (base, head):
        try:
            records.append(side.ask("structure", case=request.case, backend=request.backend, targets=targets))
        except WorkerError as error:
            records.append(error)
    return [correct, *_counted(request, names, *records)]


def _status(side: Side, request: ComparisonRequest) -> tuple[str, str]:
    """(status of the verdict, or kind of the WorkerError; reason)"""
    try:
        record = side.ask("verdict", case=request.case, backend=request.backend)
    except WorkerError as error:
        return error.kind, error.message
    return record["status"], record["reason"]


def _correctness(request: ComparisonRequest, base: tuple[str, str], head: tuple[str, str]) -> Comparison:
    row = Comparison(request.case, request.backend, "correct", SAME, base[0], head[0])
    row.remarks = [
        f"{s} at {at}: {first_line(w)}" for (s, w), at in ((base, "BASE"), (head, "HEAD")) if s not in CORRECT
    ]
    good = base[0] in CORRECT, head[0] in CORRECT
    if good == (True, False):
        row.outcome = REGRESSED  # wrong, or no longer there
    elif good == (False, True):
        row.outcome = NOT_COMPARED if base[0] == "unsupported" else IMPROVED
    elif good == (False, False):
        row.outcome = NOT_COMPARED
        if base[0] == "unsupported" != head[0]:
            row.outcome = REGRESSED  # newly claimed, and wrong
    return row


def _counted(
    request: ComparisonRequest,
    names: Iterable[str],
    base: dict[str, Any] | WorkerError,
    head: dict[str, Any] | WorkerError,
) -> list[Comparison]:
    """Compare exact metrics: a value that is worse by any amount is a regression."""
    rows = []
    for name in names:
        row = Comparison(request.case, request.backend, name, NOT_COMPARED)
        row.base, row.head = (None if isinstance(r, WorkerError) else r["metrics"].get(name) for r in (base, head))
        if row.base is not None and row.head is not None:
            row.outcome = _exact_outcome(name, row.base, row.head)
        elif row.base is not None:
            row.outcome = REGRESSED
        rows.append(row)
    remarks = [
        f"{error.kind} at {at}: {first_line(error.message)}"
        for at, error in (("BASE", base), ("HEAD", head))
        if isinstance(error, WorkerError)
    ]
    if not isinstance(base, WorkerError) and not isinstance(head, WorkerError):
        remarks = differences(base, head)
        remarks += [f"{r.metric}: not known at BASE or at HEAD" for r in rows if r.base is None or r.head is None]
    changed = [row for row in rows if row.outcome != SAME]
    if changed:
        changed[-1].remarks = remarks
    return rows


def _exact_outcome(name: str, base: float, head: float) -> str:
    if base == head:
        return SAME
    return REGRESSED if (head > base) == METRICS[name].higher_is_worse else IMPROVED


# -- timed ------------------------------------------------------------------------------------------------------------
class Trial:
    """One timed metric of one request, while it is sampled."""

    def __init__(self, request: ComparisonRequest, metric: str) -> None:
        self.request, self.metric = request, metric
        self.outcome = UNDECIDED
        self.levels: list[Levels] = []
        self.samples: dict[str, list[float]] = {side: [] for side in SIDES}
        self.estimate: Estimate | None = None
        self.detectable: float | None = None
        self.seconds = 0.0
        self.status: dict[str, str] = {}  #: by "BASE" and "HEAD": the kind of error of a side without times
        self.remarks: list[str] = []

    @property
    def open(self) -> bool:
        """Whether it needs more samples."""
        return self.outcome == UNDECIDED

    def generation(self, sides: dict[str, Side]) -> None:
        """Sample one more generation. Each side has a process that is new to this trial."""
        begun = time.monotonic()
        self.attempt(sides, 1)
        if self.open and (blocks := self._blocks(sides)):
            self.levels.append(statistics.levels(blocks))
            for block in blocks:
                for name, samples in block.items():
                    self.samples[name] += samples
        self.seconds += time.monotonic() - begun

    def attempt(self, sides: dict[str, Side], count: int) -> None:
        """Request and drop `count` samples, for which each process judges the case, prepares, compiles and warms up."""
        for name, side in sides.items():
            self._ask(name, side, count)

    def _blocks(self, sides: dict[str, Side]) -> list[dict[str, list[float]]]:
        """The blocks of a generation; none if a side fails."""
        least, most = SAMPLES
        begun = time.monotonic()
        self._ask("base", sides["base"], least)
        count = int(BLOCK_SECONDS * least / (time.monotonic() - begun))
        count = min(max(count, least), most)
        blocks = []
        for order in ORDERS * ROUNDS:
            blocks.append({name: self._ask(name, sides[name], count) for name in order})
            if not self.open:
                return []
        return blocks

    def _ask(self, name: str, side: Side, count: int) -> list[float]:
        """Samples of one side. An error of HEAD alone is a regression; with an error of BASE nothing is compared."""
        case, backend = self.request.case, self.request.backend
        try:
            return side.ask("time", case=case, backend=backend, metric=self.metric, samples=count)["samples"]
        except WorkerError as error:
            at = "HEAD" if name == "head" else "BASE"
            self.outcome = REGRESSED if at == "HEAD" and self.open else NOT_COMPARED
            self.status[at] = error.kind
            self.remarks.append(f"{error.kind} at {at}: {first_line(error.message)}")
            return []

    def row(self) -> Comparison:
        """The result so far."""
        row = Comparison(self.request.case, self.request.backend, self.metric, self.outcome, remarks=self.remarks)
        if self.levels:
            row.base = median(self.samples["base"] + self.samples["again"])
            row.head = median(self.samples["head"])
            row.samples = len(self.samples["head"])
        row.base, row.head = self.status.get("BASE", row.base), self.status.get("HEAD", row.head)
        row.estimate, row.detectable, row.seconds = self.estimate, self.detectable, self.seconds
        return row


def measure(
    trials: Sequence[Trial], sides: dict[str, Side], deadline: float, threshold: float, progress: Callable[[str], None]
) -> None:
    """Sample the trials until each is decided, or until no further look fits before the deadline (time.monotonic)."""
    done, took = 0, 0.0
    for look, due in enumerate(LOOKS):
        ongoing = [trial for trial in trials if trial.open]
        if not ongoing or (look and time.monotonic() + took * (due - done) > deadline):
            break
        while done < due and ongoing:
            done += 1
            progress(f"generation {done} of {due}: {len(ongoing)} timed, until they are answered")
            begun = time.monotonic()
            with started(*(sides[side] for side in SIDES)):
                for trial in ongoing:
                    trial.generation(sides)
            took = time.monotonic() - begun
            ongoing = [trial for trial in ongoing if trial.open]
        judge(trials, look, threshold)


def judge(trials: Iterable[Trial], look: int, threshold: float) -> None:
    """Decide trials at a look. A trial without samples is no hypothesis."""
    trials = list(trials)
    for trial in trials:
        if trial.open:
            trial.estimate = statistics.estimate(trial.levels, look)
    sampled = [(trial, trial.estimate) for trial in trials if trial.estimate]
    outcomes = statistics.judge([e for _, e in sampled], [trial.outcome for trial, _ in sampled], look, threshold)
    for (trial, estimate), outcome in zip(sampled, outcomes, strict=True):
        if trial.open:
            trial.detectable = statistics.detectable(estimate, len(sampled), look, threshold)
        trial.outcome = outcome


# -- about the whole --------------------------------------------------------------------------------------------------
def exit_code(rows: Iterable[Comparison]) -> int:
    """0: every metric is the same or improved. 1: one regressed. 3: one is undecided or wrong, or none was compared."""
    rows = list(rows)
    outcomes = [row.outcome for row in rows]
    if REGRESSED in outcomes:
        return 1
    wrong = any(row.outcome == NOT_COMPARED and (_wrong(row.base) or _wrong(row.head)) for row in rows)
    return 3 if UNDECIDED in outcomes or wrong or not {SAME, IMPROVED} & set(outcomes) else 0


def _wrong(status: Any) -> bool:
    return isinstance(status, str) and status not in (*CORRECT, "unsupported")


def identical(checkouts: Checkouts, base: str, head: str, folder: str) -> bool:
    """Whether both sides have the same files in a folder of the repository, or everywhere if it is ""."""

    def tree(commit: str) -> str | None:
        if commit == WORKTREE:
            if checkouts.git("status", "--porcelain", "--", folder or ".").stdout.strip():
                return None
            commit = "HEAD"
        done = checkouts.git("rev-parse", f"{commit}:{folder}")
        return None if done.returncode else done.stdout.strip()

    return tree(base) is not None and tree(base) == tree(head)
