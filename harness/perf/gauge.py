"""One commit after another is measured: by a worker each, or out of the log if an earlier search did it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from harness.perf.bisect_log import Log
from harness.perf.checkout import CannotBuild, Checkouts, Worker, WorkerError
from harness.perf.metrics import Metric

KEEP = 4  #: workers alive: a search ends by going to and fro between few commits and the good end
#: Pairs of samples that a worker gives before another process takes its place. Where a process's memory lies shifts all
#: that it measures; no commit's level may hang on one process.
SERVES = 24


#: Crashes that say nothing about the kernel: a module that is imported in the first call is no Python, or not there.
NOT_IMPORTED = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError")


class Unmeasurable(Exception):
    """A commit that has no value, with the reason in one line."""


class Lost(Exception):
    """The good end, against which everything is timed, cannot be timed."""


@dataclass(frozen=True)
class Question:
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
class Bench:
    """Workers, of which the `keep` used last stay alive. The reference has one of its own, also where it is compared
    with itself: what two processes of one commit differ by is noise that must be seen."""

    checkouts: Checkouts
    device: str
    keep: int = KEEP
    _workers: dict[tuple[str, str], Worker] = field(default_factory=dict)

    def ask(self, commit: str, question: str, role: str = "", **fields: Any) -> dict[str, Any]:
        """The worker's answer. Unmeasurable if the commit cannot be built; WorkerError."""
        worker = self._workers.pop((commit, role), None)
        if worker is None:
            while len(self._workers) >= self.keep:
                self.renew(*next(iter(self._workers)))
            try:
                worker = self.checkouts.worker(commit, self.device)
            except CannotBuild as error:
                raise Unmeasurable(error.reason) from error
        self._workers[commit, role] = worker
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


class Gauge:
    """Answers one Question about any commit; `fresh` counts the measurements that are not from the log."""

    def __init__(self, question: Question, bench: Bench, log: Log, reference: str) -> None:
        self.question, self.bench, self.log, self.reference = question, bench, log, reference
        self.fresh = 0
        self._told: dict[str, int] = {}  #: pairs of the log that were given out, by commit
        self._served: dict[tuple[str, str], int] = {}

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
        """The record of harness/perf/structure.py, compiled for the question's targets."""
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
        """`count` log ratios of the commit's time to the reference's, next to each other, in alternating order."""
        done = self._told.get(commit, 0)
        pairs = self.log.of(commit, "pair")[done : done + count]
        while len(pairs) < count:
            pairs.append(self._pair(commit, done + len(pairs)))
        self._told[commit] = done + count
        return [math.log(pair["time"] / pair["reference"]) for pair in pairs]

    def times(self) -> list[float]:
        """Every time of the reference so far."""
        return [r["reference"] for r in self.log.records if r["kind"] == "pair"]

    def _pair(self, commit: str, number: int) -> dict[str, Any]:
        if refused := self.log.of(commit, "untimed"):
            raise Unmeasurable(refused[0]["unmeasurable"])
        times = {role: self._time(commit, role) for role in ("time", "reference")[:: -1 if number % 2 else 1]}
        self.fresh += 2
        pair = {"commit": commit, "kind": "pair", **times}
        self.log.append(pair)
        return pair

    def _time(self, commit: str, role: str) -> float:
        commit_asked = self.reference if role == "reference" else commit
        served = self._served.get((commit_asked, role), 0) + 1
        if served > SERVES:
            self.bench.renew(commit_asked, role)
            served = 1
        self._served[commit_asked, role] = served
        try:
            answer = self._ask(commit_asked, "time", role=role, metric=self.question.metric.name, samples=1)
        except Unmeasurable as reason:
            if commit_asked == self.reference:
                raise Lost(str(reason)) from reason
            self.log.append({"commit": commit, "kind": "untimed", "unmeasurable": str(reason)})
            raise
        return answer["samples"][0]


def first_line(text: str) -> str:
    """What fits into a line that is about something else."""
    return (text.strip().splitlines() or [""])[0]
