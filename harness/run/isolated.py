"""Cases judged in an isolated process: a crash, a hang or a lost device ends that process, and is a verdict.

On the CPU the process is forked. It is spawned on a GPU, whose driver does not survive a fork, and where a time limit
is running already: a fork of faulthandler's watchdog would wait for a thread that does not exist in the child.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import backend as backends
from harness import device as devices
from harness.base.time_limit import GRACE, time_limit
from harness.device import Device, DeviceLost
from harness.problem.case import Case
from harness.results.verdict import Verdict

LIMIT = 120.0  #: seconds for one case
STARTING = 120  #: seconds more for the first case of a process, for its imports


class RunnerError(Exception):
    """An error of the harness in the worker, not of a kernel; the message is its traceback."""


class IsolatedRunner:
    """Verdicts on one backend from a worker process, which is replaced when it ends.

    Use it as `with IsolatedRunner(spec, device) as runner: runner.run(case)`. limit: seconds for one case; forks: False
    spawns the worker on the CPU too.
    """

    def __init__(self, spec: str, device: Device, limit: float = LIMIT, forks: bool = True) -> None:
        self.spec, self.device, self.limit = spec, device, limit
        self._forks = forks and device.on_cpu
        self._context: Any = multiprocessing.get_context("fork" if self._forks else "spawn")
        self._process: Any = None
        self._pipe: Any = None
        self._directory = tempfile.TemporaryDirectory(prefix="moe-isolated-")
        self._stacks = Path(self._directory.name) / "stacks"  #: where every thread was when a signal ended the worker

    def __enter__(self) -> IsolatedRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._directory.cleanup()

    def run_fresh(self, case: Case) -> Verdict:
        """The verdict of a new process, in which no other case has run."""
        self._end()
        return self.run(case)

    def run(self, case: Case) -> Verdict:
        """The verdict. "crashed" or "hung" if the worker ended or did not answer; the next case gets a new worker.

        RunnerError for an error of the harness in the worker.
        """
        waiting = self.limit + GRACE
        if self._process is None:
            self._pipe, theirs = self._context.Pipe()
            forked = self._pipe if self._forks else None
            arguments = (theirs, forked, self.spec, self.device, self.limit, self._stacks, list(sys.path))
            self._process = self._context.Process(target=_serve, args=arguments, daemon=True)
            self._process.start()
            theirs.close()
            waiting += STARTING
        try:
            self._pipe.send(str(case))
            # The worker ends itself after its limit; the parent ends a worker that is stuck in a call of the driver.
            answered = self._pipe.poll(waiting + GRACE)
            answer = self._pipe.recv() if answered else self._no_answer(case, "hung", _hung(self.limit))
        except (EOFError, OSError):
            answer = self._no_answer(case, "crashed", self._how_it_ended())
        if isinstance(answer, str):
            raise RunnerError(answer)
        if answer.status == "hung" or answer.device_lost:
            self._end()
        return answer

    def _no_answer(self, case: Case, status: str, reason: str) -> Verdict:
        self._end()
        report = f"{reason}\n{self._stacks.read_text()}" if self._stacks.exists() else reason
        return Verdict(str(case), self.spec, str(self.device), status, reason=reason, report=report, spec=self.spec)

    def _how_it_ended(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        return f"the process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _hung(limit: float) -> str:
    return f"no answer in {limit:g} s"


def _serve(
    pipe: Connection, forked: Connection | None, spec: str, device: Device, limit: float, stacks: Path, path: list[str]
) -> None:
    """Receive descriptors, send verdicts. A str instead of a verdict is the traceback of an error in the harness."""
    if forked is not None:
        forked.close()  # the parent's end, or this process would never see that the parent is gone
    sys.path[:] = path
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal interrupts the parent, which ends this process
    try:
        import torch

        from harness.run.case import run_case

        devices.start({device.name})
        if device.on_cpu:
            torch.set_num_threads(1)
        backend = backends.load(spec)
        with stacks.open("w+") as dump:
            faulthandler.enable(dump)
            while True:
                case = Case.parse(pipe.recv())
                verdict = Verdict(str(case), backend.name, str(device), "hung", reason=_hung(limit), spec=spec)

                def hung(verdict: Verdict = verdict) -> None:
                    verdict.report = f"{verdict.reason}\n{stacks.read_text()}"
                    pipe.send(verdict)
                    os._exit(1)

                with time_limit(limit, hung, dump):
                    try:
                        verdict = run_case(case, backend, device, spec=spec)
                    except DeviceLost as error:
                        verdict.status, verdict.reason = "crashed", f"device lost: {error}"
                        verdict.error_type, verdict.device_lost = type(error).__name__, True
                        verdict.report = traceback.format_exc()
                pipe.send(verdict)
    except EOFError:  # the parent has closed its end
        return
    except Exception:  # the parent raises it as RunnerError
        pipe.send(traceback.format_exc())
