"""One case on one backend: poison, call, compare, verdict.

    case -> inputs -> backend.prepare -> call into fenced, poisoned memory -> judged against the oracle -> Verdict

The only module that knows both the session and the scenarios.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.backend import Backend, BackendError, Unsupported, as_backend
from harness.base.interrupts import Interrupts
from harness.base.raised import describe_error, format_error, modules_of, type_name
from harness.device import Device, DeviceLost
from harness.diagnose.failure import Failed
from harness.inputs.sizes import batch_bytes, weight_bytes
from harness.problem.case import Case, Problem
from harness.results.verdict import Verdict
from harness.run.guard import Guard, accuse
from harness.scenarios import check_scenario, run_scenario
from harness.session.applies import why_not
from harness.session.oracle_cache import ORACLE_CACHE, WHOLE
from harness.session.session import Observer, Session

ONE_AT_A_TIME = 4 * 2**30  #: bytes of weights from which only one process of a run may hold a layer


def run_case(
    case: Case, backend: Any, device: Device, family: str = "", spec: str = "", observers: Iterable[Observer] = ()
) -> Verdict:
    """The verdict on one case. Whatever a backend raises or answers is its verdict; DeviceLost means that nothing else
    can run here. KeyboardInterrupt is the user's Ctrl-C alone. DescriptorError: there is no such scenario.

    family, spec: for the record; spec is how --backend named the backend. observers: called with every judged output.
    """
    started, backend = time.perf_counter(), as_backend(backend)
    check_scenario(case)
    verdict = Verdict(str(case), backend.name, str(device), "passed", family, spec=spec)
    with Interrupts() as interrupts:
        guard = Guard()
        try:
            _run(case, backend, device, observers, verdict)
        finally:
            changed, notes = guard.changes()
        accuse(verdict, changed)
        verdict.notes += notes
        if interrupts.came:
            raise KeyboardInterrupt
    verdict.seconds = time.perf_counter() - started
    return verdict


def _run(case: Case, backend: Backend, device: Device, observers: Iterable[Observer], verdict: Verdict) -> None:
    """Run the case's scenario, and write what comes of it into the verdict."""
    session = Session(case, backend, device, observers)
    try:
        if reason := why_not(case, backend, device):
            raise Unsupported(reason)
        with _exclusive(case.problem, device):
            if reason := memory_shortfall(case.problem, device):
                raise Unsupported(reason)
            run_scenario(session)
        if len(session.doubts) == len(session.judgements):  # every match was vacuous
            verdict.status, verdict.reason = "mistrusted", (session.doubts or ["no call was judged"])[0]
    except BaseException as error:
        _conclude(error, device, verdict)
    session.fill_in(verdict)
    if not verdict.green:
        ORACLE_CACHE.forget()  # a backend that wrote to the shared tensors must not break the next one


def _conclude(error: BaseException, device: Device, verdict: Verdict) -> None:
    """Write the exception that ended the case into the verdict. DeviceLost is raised again."""
    own = (list(modules_of(error)) or [""])[-1].partition(".")[0] == "harness"
    if isinstance(error, DeviceLost) and own:
        raise error
    if isinstance(error, Unsupported) and own:
        verdict.status, verdict.reason = "unsupported", str(error)
        return
    if isinstance(error, Failed) and own:
        report = error.report
        verdict.status, verdict.reason, verdict.report = "failed", report.summary, str(report)
        verdict.error_map, verdict.cause, verdict.stage = report.error_map, report.cause, report.stage
        return
    device.synchronize()
    raised = error.__cause__ if isinstance(error, BackendError) and error.__cause__ else error
    verdict.status, verdict.error_type = "crashed", type_name(raised)
    verdict.reason, verdict.report = _reason(error), format_error(error)


def _reason(error: BaseException) -> str:
    if isinstance(error, BackendError):
        return str(error)
    # Not by an import: a kernel of production code may call pytest, the harness's own process need not have it.
    of_pytest = any("_pytest.outcomes" == vars(base).get("__module__") for base in type.mro(type(error)))
    decides = of_pytest or isinstance(error, (Unsupported, Failed, DeviceLost))
    return describe_error(error) + (" (a backend may not decide its own verdict)" if decides else "")


@contextmanager
def _exclusive(problem: Problem, device: Device) -> Iterator[None]:
    """Whole-size layers share the device with the other processes of a run: each process keeps one such layer at most,
    and the largest layers are tested by one process at a time."""
    size = weight_bytes(problem) + batch_bytes(problem)
    if device.on_cpu or size < WHOLE:
        yield
        return
    ORACLE_CACHE.make_room(problem)
    with open(Path(tempfile.gettempdir()) / f"moe-harness-{os.getuid()}-{device.name}.lock", "w") as lock:
        if size > ONE_AT_A_TIME:
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if size > ONE_AT_A_TIME:
                ORACLE_CACHE.forget()
            device.release()


def memory_shortfall(problem: Problem, device: Device) -> str | None:
    """None, or the enumerated reason why the layer and its batch do not fit the device."""
    needed, free = 3 * weight_bytes(problem) + batch_bytes(problem), device.memory_bytes()
    if needed <= free:
        return None
    return f"memory: needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free"
