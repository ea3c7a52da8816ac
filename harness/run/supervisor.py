"""The supervisor: cases judged in a worker process, so that a crash, a hang or a lost device costs one case.

    run(case) -> the worker (worker.py) -> its verdict, or "crashed" or "hung" if it ended or did not answer

One worker runs all cases until it ends, and is replaced then. On the CPU it is forked, so that a replacement costs
milliseconds; a GPU's driver does not survive a fork, so there it is spawned.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.device import Device
from harness.problem.case import Case
from harness.results.verdict import Verdict
from harness.run.worker import Start, import_all
from harness.run.worker_process import CaseTask, WorkerProcess

LIMIT = 120.0  #: seconds of a backend for one case
IN_A_ROW = 20  #: cases of a backend that end their worker, one after another, until the backend is stopped


class Supervisor:
    """Verdicts from a worker process. Close it, or use it as a context manager.

    devices: those that the worker runs on. limit: seconds of the backend for one case, 0 for no limit; threads: of
    torch in the worker, 0 for torch's own choice; loaded: {spec: backend} for a forked worker; outputs: a directory for
    the whole of what failing cases print; blame: called with the verdict on an earlier case that ended a later one;
    forks: False spawns the worker on the CPU too, for a process that has used its threads.
    """

    def __init__(
        self, devices: Iterable[Device], limit: float = LIMIT, threads: int = 1,
        loaded: Mapping[str, Any] | None = None, outputs: Path | None = None,
        blame: Callable[[Verdict], None] | None = None, forks: bool = True,
    ) -> None:  # fmt: skip
        devices = list(devices)
        self.limit, self.outputs, self.blame = limit, outputs, blame
        self._forks = forks and all(device.on_cpu for device in devices)
        self._loaded = loaded or {}
        self._folder = tempfile.TemporaryDirectory(prefix="moe-harness-")
        self._start = Start(self._folder.name, tuple(device.name for device in devices), threads)
        self._worker: WorkerProcess | None = None
        self._previous: CaseTask | None = None  #: the last task of the worker, if it has had one
        self._ended: Counter[str] = Counter()  #: cases in a row that ended the worker, by spec

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker, and remove its files."""
        self.renew()
        self._folder.cleanup()

    def start(self) -> WorkerProcess:
        """The worker; a new one, which is not waited for, if there is none."""
        if self._worker is None:
            self._previous = None
            if self._forks:
                import_all()
            self._worker = WorkerProcess(self._start, self._loaded, self._forks)
        return self._worker

    def renew(self) -> None:
        """End the worker: the next case gets a new one, in which no other has run."""
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def run(
        self, case: Case, spec: str, device: Device, family: str = "", name: str = "", known: bool = False
    ) -> Verdict:
        """The verdict on one case. RunnerError for an error of the harness in the worker.

        name: the backend's, for a verdict that the worker does not give; known: that the case ends its worker is a
        known failure, which does not count towards IN_A_ROW.
        """
        task = CaseTask(str(case), spec, device, family, name or spec)
        if self._ended[spec] >= IN_A_ROW:
            return task.verdict("crashed", f"not run after {IN_A_ROW} crashes")
        verdict, ended, previous = self._ask(task)
        if ended and previous:
            verdict, ended = self._second_opinion(task, verdict, previous)
        if not ended and verdict.status != "unsupported":
            self._ended[spec] = 0
        elif ended and not known:
            self._ended[spec] += 1
        return verdict

    def _ask(self, task: CaseTask) -> tuple[Verdict, bool, CaseTask | None]:
        """(the verdict, whether its case ended the worker, the task before it in the worker)."""
        worker = self.start()
        previous = self._previous
        try:
            verdict, ended = worker.ask(task, self.limit, self.outputs)
        except BaseException:  # RunnerError, the user's Ctrl-C
            self.renew()
            raise
        self._previous = task
        if ended or worker.retires:
            self.renew()
        return verdict, ended, previous

    def _second_opinion(self, task: CaseTask, first: Verdict, previous: CaseTask) -> tuple[Verdict, bool]:
        """(the verdict on a case that ended a worker in which others had run before, whether it ended the worker).

        If it does not end a new worker, the case before it is at fault if it can be shown, or else it is not known
        which one is, and the reason says so.
        """
        again, ended, _ = self._ask(task)
        if ended:
            return again, True
        self.renew()
        self._ask(previous)
        if self._worker is not None and self._ask(task)[1] and self.blame:
            reason = f"the next case, {task.case} on {task.name}, ended the process, which it does not alone: "
            self.blame(previous.verdict("crashed", reason + first.reason))
            again.notes.append(f"it ended the process after {previous.case} on {previous.name}, and not alone")
            return again, False
        reason = f"{first.reason}; alone in a new process the case is {again.status}. An earlier case of the process "
        reason += f"may be at fault: the last was {previous.case} on {previous.name}"
        return replace(first, reason=reason, report=f"{reason}\n{first.details}"), True
