"""A mutant's process: imports the kernels with the bug, runs cases, and sends the result of each to the parent."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import device as devices
from harness.device import Device
from harness.mutate import structure
from harness.mutate.bugs import Bug
from harness.mutate.protocol import START, MutantRun, Schedule, Settings
from harness.mutate.structure import Counts
from harness.problem.families import CaseRow
from harness.results.verdict import Verdict

#: Exceptions of an edit that leaves no valid program, rather than a wrong one.
INVALID_PROGRAM = {"NameError", "SyntaxError", "ImportError", "ModuleNotFoundError", "UnboundLocalError"}
COMPILATION_ERROR = "CompilationError"
#: Exceptions that wrap one of a kernel, two of Triton and that of a sequence of calls: only their text names the other.
WRAPPERS, QUOTED = ("InterpreterError", COMPILATION_ERROR, "Crashed"), re.compile(r"\b\w+Error\b")
#: A kernel that does not compile for one case is a bug noticed there; one that does not compile for this case either
#: is no valid program.
PLAINEST = "t5-h64-i64-e4-k2-bf16-exact"
WANTS_COUNTS = "counts"  #: the message that requests what the unmodified kernels do
_PR_SET_PDEATHSIG = 1


def run_worker(bug: Bug, settings: Settings, schedule: Schedule | None, directory: str, parent: Connection) -> None:
    """Run the cases of the schedule on the kernels/ in `directory`; without a schedule count what the calls do.

    Sends (case, backend, family) before each case, and its MutantRun after it.
    """
    _isolate()
    for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
        del sys.modules[name]
    sys.path.insert(0, directory)
    at = START
    try:
        for message in _messages(bug, settings, schedule, parent):
            at = at if isinstance(message, MutantRun) else message
            parent.send(message)
    except Exception as error:  # of the harness: an exception of the kernels becomes a verdict
        text = "".join(traceback.format_exception(error))
        parent.send(MutantRun(*at, "error", f"{type(error).__name__}: {error}", more={"traceback": text}))


def _isolate() -> None:
    """Keep the effects of the bug in this process."""
    os.setpgrp()  # its children are killed with it
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no mutant outlives its parent
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first process to end if memory runs out
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)


def _messages(bug: Bug, settings: Settings, schedule: Schedule | None, parent: Connection) -> Iterator[Any]:
    devices.start({settings.device})
    import torch

    from harness import backend as backends

    torch.set_num_threads(1)
    backends.forget()
    device = Device(settings.device, emulated=settings.device == "xpu" and "xpu" not in devices.present())
    try:
        loaded = {spec: backends.load(spec) for spec in bug.backends}
    except backends.BackendError as error:
        yield _run(bug, START, "crashed", str(error), _error_type(error))
        return
    if device.emulated:
        loaded = {spec: backend for spec, backend in loaded.items() if backend.xpu_contract}
    if schedule is None:
        yield from _count(bug, device, None)
        return
    cases = _Cases(bug, loaded, device, settings.rules)
    first = cases.run(schedule.rows)
    if bug.control:  # a control may have other tiles: its calls are not counted
        yield from _some(first, settings.control_runs)
        return
    noticed = False
    if bug.family == structure.FAMILY:
        noticed = yield from _count(bug, device, parent)
    if not noticed:
        noticed = yield from _until_noticed(first, settings.limit, device)
    if not noticed and bug.family != structure.FAMILY:
        yield from _count(bug, device, parent)
    yield from _some(first, settings.more // 2)
    yield from _some(cases.run(schedule.others), settings.more - settings.more // 2)


def _until_noticed(messages: Iterator[Any], limit: float, device: Device) -> Generator[Any, None, bool]:
    """Yield messages until a run is decisive or `limit` seconds have passed; return whether a run was decisive."""
    clock = time.process_time if device.interprets_triton else time.monotonic  # as many cases on a busy machine
    end = clock() + limit
    for message in messages:
        yield message
        if isinstance(message, MutantRun) and (message.decisive or clock() > end):
            return message.decisive
    return False


def _some(messages: Iterator[Any], runs: int) -> Iterator[Any]:
    while runs and (message := next(messages, None)):
        yield message
        runs -= isinstance(message, MutantRun) and message.status != "unsupported"


class _Cases:
    """Runs rows on all backends of the bug, each row once."""

    def __init__(self, bug: Bug, loaded: dict[str, Any], device: Device, rules: tuple[str, ...]) -> None:
        from harness.mutate.field_rules import Watcher

        self._bug, self._loaded, self._device = bug, loaded, device
        self._done: set[CaseRow] = set()
        self._watcher = Watcher(rules) if rules else None
        self._observers = [self._watcher] if self._watcher else []

    def run(self, rows: tuple[CaseRow, ...]) -> Iterator[Any]:
        """Yield (case, backend, family) before each case, and its MutantRun after it."""
        for row in rows:
            if row not in self._done:
                self._done.add(row)
                for spec, backend in self._loaded.items():
                    yield from self._run_on(row, spec, backend)

    def _run_on(self, row: CaseRow, spec: str, backend: Any) -> Iterator[Any]:
        from harness import backend as backends
        from harness.run.case import run_case
        from harness.session.applies import why_not

        at = (str(row.case), spec, row.family)
        try:
            if why_not(row.case, backend, self._device):
                return
        except Exception as error:  # of the backend's supports()
            yield _crashed(self._bug, at, error)
            return
        yield at
        try:
            verdict = run_case(row.case, backend, self._device, row.family, spec, self._observers)
        except (devices.DeviceLost, backends.BackendError) as error:
            yield _crashed(self._bug, at, error)
            return
        # Right outputs, or none that were compared, and a failure all the same: another promise is broken.
        status = "promise" if verdict.status == "failed" and verdict.budget <= 1 else verdict.status
        if _fails_to_compile(verdict) and not _intended(self._bug, verdict.error_type, verdict.reason):
            status = status if self._compiles(backend) else "stillborn"
        run = _run(self._bug, at, status, verdict.reason, verdict.error_type, verdict.seconds)
        run.more = {"cause": verdict.cause, "stage": verdict.stage} if verdict.cause or verdict.stage else {}
        if self._watcher:
            run.more |= self._watcher.take()
        yield run

    def _compiles(self, backend: Any) -> bool:
        from harness.problem.case import Case
        from harness.run.case import run_case

        return not _fails_to_compile(run_case(Case.parse(PLAINEST), backend, self._device))


def _count(bug: Bug, device: Device, parent: Connection | None) -> Generator[Any, None, bool]:
    """Run every counted case until one differs from the unmodified kernels; return whether one did.

    `parent` sends the counts of the unmodified kernels; None if these are the unmodified kernels.
    """
    unmodified: Counts | None = None
    for descriptor, spec in structure.cases(bug.backends, bug.words):
        if parent is not None and unmodified is None:
            parent.send(WANTS_COUNTS)
            unmodified = parent.recv()
        at = (descriptor, spec, structure.FAMILY)
        yield at
        started = time.monotonic()
        if unmodified is None:
            yield MutantRun(*at, "passed", more={"counts": structure.count(descriptor, spec, device)})
            continue
        result = structure.compare(descriptor, spec, device, unmodified.get((descriptor, spec)))
        run = _run(bug, at, *result, time.monotonic() - started)
        yield run
        if run.decisive:
            return True
    return False


def _crashed(bug: Bug, at: tuple[str, str, str], error: Exception) -> MutantRun:
    return _run(bug, at, "crashed", f"{type(error).__name__}: {error}", _error_type(error))


def _run(
    bug: Bug, at: tuple[str, str, str], status: str, reason: str, error_type: str, seconds: float = 0.0
) -> MutantRun:
    """The run, "stillborn" if it crashed because the edit left no valid program."""
    invalid = INVALID_PROGRAM & _error_types(error_type, reason)
    if status == "crashed" and invalid and not _intended(bug, error_type, reason):
        status = "stillborn"
    return MutantRun(*at, status, reason, seconds)


def _error_type(error: Exception) -> str:
    """The class name of an exception, or of its cause: a BackendError is raised from that of an import."""
    return type(error.__cause__ or error).__name__


def _error_types(error_type: str, reason: str) -> set[str]:
    """The class name of an exception, and the names that its text quotes if it wraps another."""
    return {error_type, *(QUOTED.findall(reason) if error_type in WRAPPERS else ())}


def _fails_to_compile(verdict: Verdict) -> bool:
    return COMPILATION_ERROR in _error_types(verdict.error_type, verdict.reason)


def _intended(bug: Bug, error_type: str, reason: str) -> bool:
    """Whether the bug consists in raising this exception."""
    return bool(bug.raises) and bug.raises in _error_types(error_type, reason)
