"""One case on one backend: poison, call, compare, verdict.

    case -> inputs -> backend.prepare -> call into fenced, poisoned memory -> judged against the oracle -> Verdict

The only module that knows both the session and the scenarios.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import backend as backends
from harness.backend import Unsupported
from harness.device import Device, DeviceLost
from harness.diagnose.failure import Failed
from harness.inputs.draw import forget as forget_layers
from harness.inputs.sizes import batch_bytes, weight_bytes
from harness.problem.case import Case, Problem
from harness.results.verdict import Verdict
from harness.scenarios import run_scenario
from harness.session.applies import why_not
from harness.session.oracle_cache import _EXPECTED, WHOLE, _drawn
from harness.session.session import Observer, Session

ONE_AT_A_TIME = 4 * 2**30  #: bytes of weights from which only one process of a run may hold a layer


def run_case(case: Case, backend: Any, device: Device, family: str = "", observers: Iterable[Observer] = ()) -> Verdict:
    """The verdict for one case. A kernel's fault is a verdict; DeviceLost means that nothing else can run here."""
    started = time.perf_counter()
    if reason := why_not(case, backend, device):
        verdict = Verdict(str(case), backend.name, str(device), "unsupported", family, reason)
    else:
        with _exclusive(case.problem, device):
            verdict = _run(case, backend, device, family, observers)
    verdict.seconds = time.perf_counter() - started
    return verdict


def _run(case: Case, backend: Any, device: Device, family: str, observers: Iterable[Observer]) -> Verdict:
    verdict = Verdict(str(case), backend.name, str(device), "passed", family)
    session = None
    try:
        if reason := memory_shortfall(case.problem, device):
            raise Unsupported(reason)
        session = Session(case, backend, device, observers)
        run_scenario(session)
        if len(session.doubts) == len(session.judgements):  # not one call was telling
            verdict.status, verdict.reason = "mistrusted", (session.doubts or ["no call was judged"])[0]
    except Unsupported as reason:
        verdict.status, verdict.reason = "unsupported", str(reason)
    except Failed as failure:
        verdict.status, verdict.reason, verdict.report = "failed", failure.summary, failure.report
        verdict.error_map, verdict.cause, verdict.stage = failure.error_map, failure.cause, failure.stage
    except (DeviceLost, backends.BackendError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever a kernel raises is its verdict, with the whole traceback
        device.synchronize()
        verdict.status = "crashed"
        verdict.reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        verdict.report = traceback.format_exc()
    if session is not None:
        session.fill_in(verdict)
    if not verdict.green:
        # The tensors are shared between backends: one that broke them must not break the next.
        forget()
    return verdict


@contextmanager
def _exclusive(problem: Problem, device: Device) -> Iterator[None]:
    """Whole-size layers share the device with other processes of the run: none keeps more than the layer it is at, and
    the largest are tested by one process at a time."""
    size = weight_bytes(problem) + batch_bytes(problem)
    if device.on_cpu or size < WHOLE:
        yield
        return
    if (key := problem.weights_key()) != _WHOLE_AT.get("layer"):
        forget()
        _WHOLE_AT["layer"] = key
    with open(Path(tempfile.gettempdir()) / f"moe-harness-{os.getuid()}-{device.name}.lock", "w") as turn:
        if size > ONE_AT_A_TIME:
            fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            yield
        finally:
            if size > ONE_AT_A_TIME:
                forget()
            device.release()


_WHOLE_AT: dict[str, Problem] = {}


def forget() -> None:
    """Drop every drawn tensor and expected result."""
    forget_layers()
    _drawn.cache_clear()
    _EXPECTED.clear()


def memory_shortfall(problem: Problem, device: Device) -> str | None:
    needed, room = 3 * weight_bytes(problem) + batch_bytes(problem), device.memory_bytes()
    if needed <= room:
        return None
    return f"memory: needs about {needed / 2**30:.0f} GiB, {room / 2**30:.0f} GiB are free"
