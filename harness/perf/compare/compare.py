"""Two versions of the kernels, compared: first what is exact, then time.

    question: case, backend, metrics -> verdict on both sides -> exact metrics, once a side -> timed metrics: trials

A case that is not correct on both sides has no speed. Trials are sampled in generations of three processes until
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
from harness.perf.metrics import METRICS, TARGETS
from harness.perf.versions.checkout import WORKTREE, Checkouts, Worker, WorkerError, first_line

NOT_COMPARED = "not compared"
GOOD = ("passed", "mistrusted")
ROUNDS = 3  #: of blocks in a generation, each round in all orders: many short blocks, as what disturbs comes in bursts
BLOCK_SECONDS = 0.02  #: of samples of one side in one block
SAMPLES = (3, 20)  #: in one block of one side: at least, at most


@dataclass(frozen=True)
class Question:
    """What is compared: names of METRICS for a case (descriptor) on a backend (as --backend names it)."""

    case: str
    backend: str
    metrics: tuple[str, ...]


@dataclass
class Comparison:
    """One metric of one question, answered. The metric "correct" has statuses for values, others numbers or None."""

    case: str
    backend: str
    metric: str
    verdict: str  #: regressed, improved, same, undecided, not compared
    base: Any = None
    head: Any = None
    remarks: list[str] = field(default_factory=list)
    estimate: Estimate | None = None  #: of timed metrics
    detectable: float | None = None  #: the least relative change that would have been found
    samples: int = 0  #: of each side
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class Side:
    """One version, asked by one process at a time: a new one after each that died."""

    def __init__(self, checkouts: Checkouts, commit: str, device: str) -> None:
        self.checkouts, self.commit, self.device = checkouts, commit, device
        self.environment: dict[str, Any] = {}  #: of the first process that answered
        self._worker: Worker | None = None

    def start(self) -> Worker:
        if self._worker is None or not self._worker.alive:
            self._worker = self.checkouts.worker(self.commit, self.device)
        return self._worker

    def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """As Worker.ask."""
        worker = self.start()
        self.environment = self.environment or worker.ask("hello")
        return worker.ask(question, **fields)

    def ready(self) -> None:
        """Returns when the process answers, or cannot: then the next question says why."""
        with suppress(WorkerError):
            self.ask("hello")

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None


@contextmanager
def started(*sides: Side) -> Iterator[None]:
    """The sides' processes, all starting at once, ended with the context."""
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
    base: Side, head: Side, questions: Sequence[Question], budget: float, threshold: float, tell: Callable[[str], None]
) -> list[Comparison]:
    """The answers, in the order of the questions. budget: seconds from now, after which no look is begun but the first;
    threshold: the relative change of time that counts, 0.01 for 1 %. tell: is told of progress, a line each."""
    begun = time.monotonic()
    rows: list[Comparison] = []
    trials: list[Trial] = []
    with started(base, head):
        for number, question in enumerate(questions, 1):
            tell(f"{number} of {len(questions)}: {question.case} on {question.backend}")
            found = exact(base, head, question)
            rows += found
            if found[0].base in GOOD and found[0].head in GOOD:
                asked = [Trial(question, name) for name in question.metrics if not METRICS[name].exact]
                for trial in asked:
                    trial.attempt({"base": base, "head": head}, 0)
                trials += asked
    again = Side(base.checkouts, base.commit, base.device)
    measure(trials, {"base": base, "again": again, "head": head}, begun + budget, threshold, tell)
    places = {(q.case, q.backend): n for n, q in enumerate(questions)}
    return sorted(rows + [trial.row() for trial in trials], key=lambda row: places[row.case, row.backend])


# -- exact ------------------------------------------------------------------------------------------------------------
def exact(base: Side, head: Side, question: Question) -> list[Comparison]:
    """The row of "correct", always, and those of the question's exact metrics if both sides are."""
    correct = _correctness(question, *(_status(side, question) for side in (base, head)))
    names = [name for name in question.metrics if METRICS[name].source in ("structure", "compiled")]
    if not names or correct.base not in GOOD or correct.head not in GOOD:
        return [correct]
    targets = TARGETS if any(METRICS[name].source == "compiled" for name in names) else ()
    records: list[dict[str, Any] | WorkerError] = []
    for side in (base, head):
        try:
            records.append(side.ask("structure", case=question.case, backend=question.backend, targets=targets))
        except WorkerError as error:
            records.append(error)
    return [correct, *_counted(question, names, *records)]


def _status(side: Side, question: Question) -> tuple[str, str]:
    """The verdict's status, or the kind of WorkerError; and the reason."""
    try:
        record = side.ask("verdict", case=question.case, backend=question.backend)
    except WorkerError as error:
        return error.kind, error.message
    return record["status"], record["reason"]


def _correctness(question: Question, base: tuple[str, str], head: tuple[str, str]) -> Comparison:
    row = Comparison(question.case, question.backend, "correct", SAME, base[0], head[0])
    row.remarks = [f"{s} at {at}: {first_line(w)}" for (s, w), at in ((base, "BASE"), (head, "HEAD")) if s not in GOOD]
    good = base[0] in GOOD, head[0] in GOOD
    if good == (True, False):
        row.verdict = REGRESSED  # wrong, or no longer there
    elif good == (False, True):
        row.verdict = NOT_COMPARED if base[0] == "unsupported" else IMPROVED
    elif good == (False, False):
        row.verdict = NOT_COMPARED
        if base[0] == "unsupported" != head[0]:
            row.verdict = REGRESSED  # newly claimed, and wrong
    return row


def _counted(
    question: Question, names: Iterable[str], base: dict[str, Any] | WorkerError, head: dict[str, Any] | WorkerError
) -> list[Comparison]:
    """Numbers that are exact: any that is worse is a regression, whatever its size."""
    from harness.perf.count.differences import differences

    rows = []
    for name in names:
        row = Comparison(question.case, question.backend, name, NOT_COMPARED)
        row.base, row.head = (None if isinstance(r, WorkerError) else r["metrics"].get(name) for r in (base, head))
        if row.base is not None and row.head is not None:
            row.verdict = _exact_verdict(name, row.base, row.head)
        elif row.base is not None:
            row.verdict = REGRESSED
        rows.append(row)
    remarks = [
        f"{error.kind} at {at}: {first_line(error.message)}"
        for at, error in (("BASE", base), ("HEAD", head))
        if isinstance(error, WorkerError)
    ]
    if not isinstance(base, WorkerError) and not isinstance(head, WorkerError):
        remarks = differences(base, head)
        remarks += [f"{r.metric}: not known at BASE or at HEAD" for r in rows if r.base is None or r.head is None]
    changed = [row for row in rows if row.verdict != SAME]
    if changed:
        changed[-1].remarks = remarks
    return rows


def _exact_verdict(name: str, base: float, head: float) -> str:
    if base == head:
        return SAME
    return REGRESSED if (head > base) == METRICS[name].higher_is_worse else IMPROVED


# -- timed ------------------------------------------------------------------------------------------------------------
class Trial:
    """One timed metric of one question, while it is sampled."""

    def __init__(self, question: Question, metric: str) -> None:
        self.question, self.metric = question, metric
        self.answer = UNDECIDED
        self.levels: list[Levels] = []
        self.samples: dict[str, list[float]] = {side: [] for side in SIDES}
        self.estimate: Estimate | None = None
        self.detectable: float | None = None
        self.seconds = 0.0
        self.status: dict[str, str] = {}  #: by BASE and HEAD, why they have no time
        self.remarks: list[str] = []

    @property
    def open(self) -> bool:
        return self.answer == UNDECIDED

    def generation(self, sides: dict[str, Side]) -> None:
        """One generation more; each side's process is one that this trial has not seen."""
        begun = time.monotonic()
        self.attempt(sides, 1)
        if self.open and (blocks := self._blocks(sides)):
            self.levels.append(statistics.levels(blocks))
            for block in blocks:
                for name, samples in block.items():
                    self.samples[name] += samples
        self.seconds += time.monotonic() - begun

    def attempt(self, sides: dict[str, Side], count: int) -> None:
        """The first samples of these processes, thrown away: each judges the case, prepares, compiles and warms up."""
        for name, side in sides.items():
            self._ask(name, side, count)

    def _blocks(self, sides: dict[str, Side]) -> list[dict[str, list[float]]]:
        """The blocks of a generation; none if a side failed."""
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
        """Samples. What BASE cannot do is not compared; what HEAD alone cannot do is worse than slow."""
        case, backend = self.question.case, self.question.backend
        try:
            return side.ask("time", case=case, backend=backend, metric=self.metric, samples=count)["samples"]
        except WorkerError as error:
            at = "HEAD" if name == "head" else "BASE"
            self.answer = REGRESSED if at == "HEAD" and self.open else NOT_COMPARED
            self.status[at] = error.kind
            self.remarks.append(f"{error.kind} at {at}: {first_line(error.message)}")
            return []

    def row(self) -> Comparison:
        """What came of it."""
        row = Comparison(self.question.case, self.question.backend, self.metric, self.answer, remarks=self.remarks)
        if self.levels:
            row.base = median(self.samples["base"] + self.samples["again"])
            row.head = median(self.samples["head"])
            row.samples = len(self.samples["head"])
        row.base, row.head = self.status.get("BASE", row.base), self.status.get("HEAD", row.head)
        row.estimate, row.detectable, row.seconds = self.estimate, self.detectable, self.seconds
        return row


def measure(
    trials: Sequence[Trial], sides: dict[str, Side], deadline: float, threshold: float, tell: Callable[[str], None]
) -> None:
    """Sample the trials until each is answered or no further look fits before the deadline (time.monotonic)."""
    done, took = 0, 0.0
    for look, due in enumerate(LOOKS):
        ongoing = [trial for trial in trials if trial.open]
        if not ongoing or (look and time.monotonic() + took * (due - done) > deadline):
            break
        while done < due and ongoing:
            done += 1
            tell(f"generation {done} of {due}: {len(ongoing)} timed, until they are answered")
            begun = time.monotonic()
            with started(*(sides[side] for side in SIDES)):
                for trial in ongoing:
                    trial.generation(sides)
            took = time.monotonic() - begun
            ongoing = [trial for trial in ongoing if trial.open]
        judge(trials, look, threshold)


def judge(trials: Iterable[Trial], look: int, threshold: float) -> None:
    """What this look makes of the trials; those that could not be sampled are no hypotheses."""
    trials = list(trials)
    for trial in trials:
        if trial.open:
            trial.estimate = statistics.estimate(trial.levels, look)
    sampled = [(trial, trial.estimate) for trial in trials if trial.estimate]
    answers = statistics.judge([e for _, e in sampled], [trial.answer for trial, _ in sampled], look, threshold)
    for (trial, estimate), answer in zip(sampled, answers, strict=True):
        if trial.open:
            trial.detectable = statistics.detectable(estimate, len(sampled), look, threshold)
        trial.answer = answer


# -- about the whole --------------------------------------------------------------------------------------------------
def exit_code(rows: Iterable[Comparison]) -> int:
    """0: all the same or improved. 1: something regressed. 3: neither, as something, or everything, stayed open."""
    rows = list(rows)
    verdicts = [row.verdict for row in rows]
    if REGRESSED in verdicts:
        return 1
    wrong = any(row.verdict == NOT_COMPARED and (_wrong(row.base) or _wrong(row.head)) for row in rows)
    return 3 if UNDECIDED in verdicts or wrong or not {SAME, IMPROVED} & set(verdicts) else 0


def _wrong(status: Any) -> bool:
    return isinstance(status, str) and status not in (*GOOD, "unsupported")


def identical(checkouts: Checkouts, base: str, head: str, folder: str) -> bool:
    """Whether both sides have the same files in a folder of the repository ("" for all of it)."""

    def tree(commit: str) -> str | None:
        if commit == WORKTREE:
            if checkouts.git("status", "--porcelain", "--", folder or ".").stdout.strip():
                return None
            commit = "HEAD"
        found = checkouts.git("rev-parse", f"{commit}:{folder}")
        return None if found.returncode else found.stdout.strip()

    return tree(base) is not None and tree(base) == tree(head)
