"""One commit after another is measured: by a worker each, or out of the log if an earlier search did it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from harness.perf.bisect.log import Log
from harness.perf.metrics import Metric
from harness.perf.versions.checkout import CannotBuild, Checkouts, Worker, WorkerError, first_line

KEEP = 4  #: workers alive
#: Pairs of samples in a sitting: of the commit and of the good end, in turn, by a new process each. Where a process's
#: memory lies shifts all that it measures, so that a sitting, whatever its length, is one observation.
PAIRS = 8
#: Crashes that say nothing about the kernel: a module that is imported in the first call is no Python, or not there.
NOT_IMPORTED = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError")


class Unmeasurable(Exception):
    """A commit that has no value, with the reason in one line."""


class ReferenceLost(Exception):
    """The good end, against which everything is timed, cannot be timed."""


@dataclass(frozen=True)
class MetricRequest:
    """What is asked of every commit."""

    case: str
    backend: str
    device: str
    metric: Metric
    target: str  #: that compiled metrics are for

    @property
    def targets(self) -> list[str]:
        return [self.target] if self.metric.source == "compiled" else []


@dataclass
class WorkerPool:
    """Workers, of which the `keep` used last stay alive. The reference has one of its own, also where it is compared
    with itself: what two processes of one commit differ by is noise that must be seen."""

    checkouts: Checkouts
    device: str
    keep: int = KEEP
    _workers: dict[tuple[str, str], Worker] = field(default_factory=dict)

    def start(self, commit: str, role: str = "") -> Worker:
        """The worker, started if there is none. Unmeasurable if the commit cannot be built."""
        worker = self._workers.pop((commit, role), None)
        if worker is None:
            while len(self._workers) >= self.keep:
                self.renew(*next(iter(self._workers)))
            try:
                worker = self.checkouts.worker(commit, self.device)
            except CannotBuild as error:
                raise Unmeasurable(error.reason) from error
        self._workers[commit, role] = worker
        return worker

    def ask(self, commit: str, question: str, role: str = "", **fields: Any) -> dict[str, Any]:
        """The worker's answer. Unmeasurable if the commit cannot be built; WorkerError."""
        worker = self.start(commit, role)
        try:
            return worker.ask(question, **fields)
        except WorkerError as error:
            if error.kind == "died":
                self.renew(commit, role)
            raise

    def renew(self, commit: str, role: str = "") -> None:
        """The next question about this commit goes to a new process."""
        if worker := self._workers.pop((commit, role), None):
            worker.close()


class Measurements:
    """Answers one Question about any commit; `fresh` counts the measurements that are not from the log."""

    def __init__(self, question: MetricRequest, bench: WorkerPool, log: Log, reference: str) -> None:
        self.question, self.bench, self.log, self.reference = question, bench, log, reference
        self.fresh = 0
        self._told: dict[str, int] = {}  #: sittings of the log that were given out, by commit

    # -- exact --------------------------------------------------------------------------------------------------------
    def value(self, commit: str) -> int:
        """The exact metric's value. Unmeasurable if the commit has none."""
        metric = self.question.metric
        if metric.source == "verdict":
            return int(self.verdict(commit)["status"] in ("passed", "mistrusted"))
        metrics = self.structure(commit)["metrics"]
        if metric.name not in metrics:
            raise Unmeasurable(f"its kernels do not compile for {self.question.target}")
        return metrics[metric.name]

    def structure(self, commit: str) -> dict[str, Any]:
        """The record of perf/count/structure.py, compiled for the question's targets."""
        return self._record(commit, "structure", targets=self.question.targets)

    def verdict(self, commit: str) -> dict[str, Any]:
        """The verdict's record. A case that ends its process has crashed; one that is not supported has no verdict."""
        record = self._record(commit, "verdict")
        if record["status"] == "unsupported":
            raise Unmeasurable(f"unsupported: {record['reason']}")
        if record["status"] == "crashed" and record["reason"].partition(":")[0] in NOT_IMPORTED:
            raise Unmeasurable(f"import: {record['reason']}")
        return record

    def _record(self, commit: str, kind: str, **fields: Any) -> dict[str, Any]:
        known = self.log.of(commit, kind)
        if not known:
            self.fresh += 1
            record: dict[str, Any]
            try:
                record = {"record": self._ask(commit, kind, **fields)}
            except Unmeasurable as reason:
                record = {"unmeasurable": str(reason)}
            self.log.append({"commit": commit, "kind": kind, **record})
            known = self.log.of(commit, kind)
        if "unmeasurable" in known[0]:
            raise Unmeasurable(known[0]["unmeasurable"])
        return known[0]["record"]

    def _ask(self, commit: str, kind: str, **fields: Any) -> dict[str, Any]:
        try:
            return self.bench.ask(commit, kind, case=self.question.case, backend=self.question.backend, **fields)
        except WorkerError as error:
            if kind == "verdict" and error.kind == "died":
                return {"status": "crashed", "reason": first_line(error.message)}
            raise Unmeasurable(first_line(str(error))) from error

    # -- timed --------------------------------------------------------------------------------------------------------
    def ratios(self, commit: str, count: int) -> list[float]:
        """`count` log ratios of the commit's time to the reference's, one a sitting."""
        done = self._told.get(commit, 0)
        sittings = self.log.of(commit, "sitting")[done : done + count]
        while len(sittings) < count:
            sittings.append(self._sitting(commit, done + len(sittings)))
        self._told[commit] = done + count
        return [paired_run["ratio"] for paired_run in sittings]

    def times(self) -> list[float]:
        """The reference's median time in every sitting so far."""
        return [r["reference"] for r in self.log.records if r["kind"] == "sitting"]

    def _sitting(self, commit: str, number: int) -> dict[str, Any]:
        if refused := self.log.of(commit, "untimed"):
            raise Unmeasurable(refused[0]["unmeasurable"])
        who = {"time": commit, "reference": self.reference}
        try:
            for role in who:
                self._start(who[role], role)  # both at once: starting takes longer than measuring
            taken: dict[str, list[float]] = {role: [] for role in who}
            for pair in range(PAIRS):
                for role in list(who)[:: -1 if (number + pair) % 2 else 1]:
                    taken[role].append(self._time(who[role], role))
        except Unmeasurable as reason:
            if commit == self.reference:
                raise ReferenceLost(str(reason)) from reason
            self.log.append({"commit": commit, "kind": "untimed", "unmeasurable": str(reason)})
            raise
        finally:
            for role in who:
                self.bench.renew(who[role], role)
        self.fresh += 1
        ratio = median(math.log(t / r) for t, r in zip(taken["time"], taken["reference"], strict=True))
        times = {role: median(found) for role, found in taken.items()}
        paired_run = {"commit": commit, "kind": "sitting", "ratio": ratio, **times}
        self.log.append(paired_run)
        return paired_run

    def _start(self, commit: str, role: str) -> None:
        try:
            self.bench.start(commit, role)
        except Unmeasurable as reason:
            raise self._of(role, reason) from reason

    def _time(self, commit: str, role: str) -> float:
        try:
            answer = self._ask(commit, "time", role=role, metric=self.question.metric.name, samples=1)
        except Unmeasurable as reason:
            raise self._of(role, reason) from reason
        return answer["samples"][0]

    def _of(self, role: str, reason: Unmeasurable) -> Exception:
        """What is wrong with the reference ends the search; with another commit, it is skipped."""
        return ReferenceLost(str(reason)) if role == "reference" else reason
