"""Measure one commit after another: each by a worker of its own, or from the log if an earlier search measured it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from harness.perf.bisect.log import Log
from harness.perf.metrics import Metric
from harness.perf.versions.checkout import CannotBuild, Checkouts, Worker, WorkerError, first_line
from harness.results.verdict import CORRECT

KEEP = 4  #: workers alive
#: Pairs of samples in a paired run: of the commit and of the good end, in turn, by a new process each. The memory
#: layout of a process shifts all its times, so that a paired run of any length is one observation.
PAIRS = 8
#: Types of the errors of a crash that say nothing about the kernel: a module that the first call imports is not there
#: or is not Python.
NOT_IMPORTED = ("SyntaxError", "IndentationError", "ImportError", "ModuleNotFoundError")


class Unmeasurable(Exception):
    """A commit that has no value. The message is the reason in one line.

    kind: as of WorkerError, or

    build     the commit cannot be checked out or built
    compiler  a kernel of the commit does not compile for the target
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


class ReferenceLost(Exception):
    """The good end cannot be timed, and all times are relative to it."""


@dataclass(frozen=True)
class MetricRequest:
    """The metric of one case on one backend and device, to be measured at every commit."""

    case: str
    backend: str
    device: str
    metric: Metric
    target: str  #: of compiled metrics, such as "sm_90"

    @property
    def targets(self) -> list[str]:
        """The targets that kernels are compiled for; none unless the metric needs it."""
        return [self.target] if self.metric.source == "compiled" else []


@dataclass
class WorkerPool:
    """Workers by (commit, role), of which the `keep` used last stay alive.

    In timed measurements the good end has the role "reference" and workers of its own, also where it is compared with
    itself: the difference between two processes of one commit is noise that must show.
    """

    checkouts: Checkouts
    device: str
    keep: int = KEEP
    _workers: dict[tuple[str, str], Worker] = field(default_factory=dict)

    def start(self, commit: str, role: str = "") -> Worker:
        """The worker, started if there is none. Raises Unmeasurable if the commit cannot be built."""
        worker = self._workers.pop((commit, role), None)
        if worker is None:
            while len(self._workers) >= self.keep:
                self.renew(*next(iter(self._workers)))
            try:
                worker = self.checkouts.worker(commit, self.device)
            except CannotBuild as error:
                raise Unmeasurable("build", error.reason) from error
        self._workers[commit, role] = worker
        return worker

    def ask(self, commit: str, request: str, role: str = "", **fields: Any) -> dict[str, Any]:
        """The worker's answer. Raises Unmeasurable if the commit cannot be built, and WorkerError."""
        worker = self.start(commit, role)
        try:
            return worker.ask(request, **fields)
        except WorkerError as error:
            if error.kind == "died":
                self.renew(commit, role)
            raise

    def renew(self, commit: str, role: str = "") -> None:
        """End the worker, so that the next request about this commit goes to a new process."""
        if worker := self._workers.pop((commit, role), None):
            worker.close()


class Measurements:
    """The values of one MetricRequest at any commit. `fresh` counts the measurements that are not from the log."""

    def __init__(self, request: MetricRequest, pool: WorkerPool, log: Log, reference: str) -> None:
        self.request, self.pool, self.log, self.reference = request, pool, log, reference
        self.fresh = 0
        self._returned: dict[str, int] = {}  #: by commit: how many paired runs `ratios` has returned so far

    # -- exact --------------------------------------------------------------------------------------------------------
    def value(self, commit: str) -> int:
        """The value of an exact metric. Raises Unmeasurable if the commit has none."""
        metric = self.request.metric
        if metric.source == "verdict":
            return int(self.verdict(commit)["status"] in CORRECT)
        metrics = self.structure(commit)["metrics"]
        if metric.name not in metrics:
            raise Unmeasurable("compiler", f"its kernels do not compile for {self.request.target}")
        return metrics[metric.name]

    def structure(self, commit: str) -> dict[str, Any]:
        """The record of CallCounts (perf/count/structure.py), compiled for the request's targets."""
        return self._record(commit, "structure", targets=self.request.targets)

    def verdict(self, commit: str) -> dict[str, Any]:
        """The verdict's record: "crashed" for a case that ends its process.

        Raises Unmeasurable for a case that is not supported, and for code that cannot be imported.
        """
        record = self._record(commit, "verdict")
        if record["status"] == "unsupported":
            raise Unmeasurable("unsupported", f"unsupported: {record['reason']}")
        if record.get("error_type") in NOT_IMPORTED:
            raise Unmeasurable("import", f"import: {record['reason']}")
        return record

    def _record(self, commit: str, kind: str, **fields: Any) -> dict[str, Any]:
        known = self.log.of_commit(commit, kind)
        if not known:
            self.fresh += 1
            record: dict[str, Any]
            try:
                record = {"record": self._ask(commit, kind, **fields)}
            except Unmeasurable as reason:
                record = _logged(reason)
            self.log.append({"commit": commit, "kind": kind, **record})
            known = self.log.of_commit(commit, kind)
        if "unmeasurable" in known[0]:
            raise Unmeasurable(known[0]["unmeasurable"], known[0]["reason"])
        return known[0]["record"]

    def _ask(self, commit: str, kind: str, **fields: Any) -> dict[str, Any]:
        try:
            return self.pool.ask(commit, kind, case=self.request.case, backend=self.request.backend, **fields)
        except WorkerError as error:
            if kind == "verdict" and error.kind == "died":
                return {"status": "crashed", "reason": first_line(error.message)}
            raise Unmeasurable(error.kind, first_line(str(error))) from error

    # -- timed --------------------------------------------------------------------------------------------------------
    def ratios(self, commit: str, count: int) -> list[float]:
        """`count` log ratios of the commit's time to the reference's, one for each paired run.

        Raises Unmeasurable if the commit cannot be timed, ReferenceLost if the good end cannot.
        """
        done = self._returned.get(commit, 0)
        runs = self.log.of_commit(commit, "paired_run")[done : done + count]
        while len(runs) < count:
            runs.append(self._paired_run(commit, done + len(runs)))
        self._returned[commit] = done + count
        return [run["ratio"] for run in runs]

    def times(self) -> list[float]:
        """The reference's median time in every paired run so far, microseconds."""
        return [record["reference"] for record in self.log.records if record["kind"] == "paired_run"]

    def _paired_run(self, commit: str, number: int) -> dict[str, Any]:
        if refused := self.log.of_commit(commit, "untimed"):
            raise Unmeasurable(refused[0]["unmeasurable"], refused[0]["reason"])
        commits = {"time": commit, "reference": self.reference}  # by role
        try:
            for role in commits:
                self._start(commits[role], role)  # both at once: a start takes longer than a measurement
            taken: dict[str, list[float]] = {role: [] for role in commits}
            for pair in range(PAIRS):
                for role in list(commits)[:: -1 if (number + pair) % 2 else 1]:
                    taken[role].append(self._time(commits[role], role))
        except Unmeasurable as reason:
            if commit == self.reference:
                raise ReferenceLost(str(reason)) from reason
            self.log.append({"commit": commit, "kind": "untimed", **_logged(reason)})
            raise
        finally:
            for role in commits:
                self.pool.renew(commits[role], role)
        self.fresh += 1
        ratio = median(math.log(t / r) for t, r in zip(taken["time"], taken["reference"], strict=True))
        times = {role: median(samples) for role, samples in taken.items()}
        record = {"commit": commit, "kind": "paired_run", "ratio": ratio, **times}
        self.log.append(record)
        return record

    def _start(self, commit: str, role: str) -> None:
        try:
            self.pool.start(commit, role)
        except Unmeasurable as reason:
            raise _error_for(role, reason) from reason

    def _time(self, commit: str, role: str) -> float:
        try:
            answer = self._ask(commit, "time", role=role, metric=self.request.metric.name, samples=1)
        except Unmeasurable as reason:
            raise _error_for(role, reason) from reason
        return answer["samples"][0]


def _logged(reason: Unmeasurable) -> dict[str, str]:
    """The fields of a log record about a commit without a value."""
    return {"unmeasurable": reason.kind, "reason": str(reason)}


def _error_for(role: str, reason: Unmeasurable) -> Exception:
    """ReferenceLost ends the search if the reference fails; any other commit is skipped."""
    return ReferenceLost(str(reason)) if role == "reference" else reason
