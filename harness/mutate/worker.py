"""In the process of a mutant: its kernels are imported and asked, and what comes of each case is sent to the parent."""

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
from harness.mutate.protocol import START, Asking, Questions, Run
from harness.mutate.structure import Counts
from harness.problem.families import CaseRow

#: What says that an edit made the kernels no program, rather than a wrong one.
STILLBORN = re.compile(r"\b(Name|Syntax|Import|ModuleNotFound|UnboundLocal)Error\b")
#: What does not compile for this case alone is a bug that was noticed; what compiles for none, not even this, is none.
PLAINEST, COMPILED_NOT = "t5-h64-i64-e4-k2-bf16-exact", "CompilationError"
WANTS_COUNTS = "counts"  #: what it says when it wants to know what the kernels as they are do
_PR_SET_PDEATHSIG = 1


def work(bug: Bug, asking: Asking, questions: Questions | None, room: str, parent: Connection) -> None:
    """Answer the questions, or, if there are none, count what the calls do, with the kernels/ in the directory `room`.

    Sends (case, backend, family) before each case, its Run after it.
    """
    _settle()
    for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
        del sys.modules[name]
    sys.path.insert(0, room)
    at = START
    try:
        for message in _answers(bug, asking, questions, parent):
            at = at if isinstance(message, Run) else message
            parent.send(message)
    except Exception as error:  # not the kernels': what they raise is a verdict
        told = "".join(traceback.format_exception(error))
        parent.send(Run(*at, "error", f"{type(error).__name__}: {error}", more={"traceback": told}))


def _settle() -> None:
    """Whatever happens here happens to nobody else."""
    os.setpgrp()  # killed with whatever it starts
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no mutant outlives who started it
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory ends, it ends this process
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)


def _answers(bug: Bug, asking: Asking, questions: Questions | None, parent: Connection) -> Iterator[Any]:
    devices.start({asking.device})
    import torch

    from harness import backend as backends

    torch.set_num_threads(1)
    backends._installed.clear()
    device = Device(asking.device, emulated=asking.device == "xpu" and "xpu" not in devices.present())
    try:
        chosen = {spec: backends.load(spec) for spec in bug.backends}
    except backends.BackendError as error:
        yield _judged(bug, *START, "crashed", str(error))
        return
    if device.emulated:
        chosen = {spec: backend for spec, backend in chosen.items() if getattr(backend, "xpu_contract", False)}
    if questions is None:
        yield from _counted(bug, device, None)
        return
    cases = _Cases(bug, chosen, device, asking.rules)
    first = cases.of(questions.rows)
    if bug.control:  # other tiles are a control's right: they are not counted
        yield from _some(first, asking.most)
        return
    noticed = False
    if bug.family == structure.FAMILY:
        noticed = yield from _counted(bug, device, parent)
    if not noticed:
        noticed = yield from _until_noticed(first, asking.limit, device)
    if not noticed and bug.family != structure.FAMILY:
        yield from _counted(bug, device, parent)
    yield from _some(first, asking.more // 2)
    yield from _some(cases.of(questions.others), asking.more - asking.more // 2)


def _until_noticed(messages: Iterator[Any], limit: float, device: Device) -> Generator[Any, None, bool]:
    clock = time.process_time if device.interprets_triton else time.monotonic  # a busy machine must not ask less
    end = clock() + limit
    for message in messages:
        yield message
        if isinstance(message, Run) and (message.telling or clock() > end):
            return message.telling
    return False


def _some(messages: Iterator[Any], runs: int) -> Iterator[Any]:
    while runs and (message := next(messages, None)):
        yield message
        runs -= isinstance(message, Run) and message.status != "unsupported"


class _Cases:
    """Rows asked on all backends of the bug, each row once."""

    def __init__(self, bug: Bug, chosen: dict[str, Any], device: Device, rules: tuple[str, ...]) -> None:
        from harness.mutate.field_rules import Watcher

        self._bug, self._chosen, self._device = bug, chosen, device
        self._asked: set[CaseRow] = set()
        self._watcher = Watcher(rules) if rules else None
        self._observers = [self._watcher] if self._watcher else []

    def of(self, rows: tuple[CaseRow, ...]) -> Iterator[Any]:
        """(case, backend, family) before each case, its Run after it."""
        for row in rows:
            if row not in self._asked:
                self._asked.add(row)
                for spec, backend in self._chosen.items():
                    yield from self._asks(row, spec, backend)

    def _asks(self, row: CaseRow, spec: str, backend: Any) -> Iterator[Any]:
        from harness import backend as backends
        from harness.run.case import run_case
        from harness.session.applies import why_not

        at = (str(row.case), spec, row.family)
        try:
            if why_not(row.case, backend, self._device):
                return
        except Exception as error:  # of the backend's supports()
            yield _judged(self._bug, *at, "crashed", f"{type(error).__name__}: {error}")
            return
        yield at
        try:
            verdict = run_case(row.case, backend, self._device, row.family, self._observers)
        except (devices.DeviceLost, backends.BackendError) as error:
            yield _judged(self._bug, *at, "crashed", f"{type(error).__name__}: {error}")
            return
        meant = self._bug.raises and self._bug.raises in verdict.reason
        if COMPILED_NOT in verdict.reason and not meant and not self._compiles(backend):
            verdict.status = "stillborn"
        # Outputs that are right, or were not looked at, and a failure all the same: what was promised beside them.
        status = "promise" if verdict.status == "failed" and verdict.budget <= 1 else verdict.status
        run = _judged(self._bug, *at, status, verdict.reason, verdict.seconds)
        run.more = {"cause": verdict.cause, "stage": verdict.stage} if verdict.cause or verdict.stage else {}
        if self._watcher:
            run.more |= self._watcher.told()
        yield run

    def _compiles(self, backend: Any) -> bool:
        from harness.problem.case import Case
        from harness.run.case import run_case

        return COMPILED_NOT not in run_case(Case.parse(PLAINEST), backend, self._device).reason


def _counted(bug: Bug, device: Device, parent: Connection | None) -> Generator[Any, None, bool]:
    """Every counted case until one differs from the kernels as they are, which `parent` knows; whether one did."""
    right: Counts | None = None
    for descriptor, spec in structure.cases(bug.backends, bug.words):
        if parent is not None and right is None:
            parent.send(WANTS_COUNTS)
            right = parent.recv()
        at = (descriptor, spec, structure.FAMILY)
        yield at
        started = time.monotonic()
        if right is None:
            yield Run(*at, "passed", more={"counts": structure.counted(descriptor, spec, device)})
            continue
        status, reason = structure.compared(descriptor, spec, device, right.get((descriptor, spec)))
        run = _judged(bug, *at, status, reason, time.monotonic() - started)
        yield run
        if run.telling:
            return True
    return False


def _judged(bug: Bug, case: str, backend: str, family: str, status: str, reason: str, seconds: float = 0.0) -> Run:
    if status == "crashed" and STILLBORN.search(reason) and not (bug.raises and bug.raises in reason):
        status = "stillborn"
    return Run(case, backend, family, status, reason, seconds)
