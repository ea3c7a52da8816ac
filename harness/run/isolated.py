"""Cases judged in a process apart: one that crashes, hangs or loses the device costs that process, and is a verdict.

The process is forked on the CPU; a GPU's driver does not survive that, so that there it is started anew. So it is where
a time limit is running already: a fork of faulthandler's watchdog would wait for a thread that it does not have.
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
STARTING = 120  #: seconds to begin with, for imports in a new process


class Broken(Exception):
    """The process failed at something that is no kernel's fault; the message is its traceback."""


class IsolatedRunner:
    """`with Apart(spec, device) as apart: apart.run(case)`: verdicts on one backend, each from a living process."""

    def __init__(self, spec: str, device: Device, limit: float = LIMIT, forks: bool = True) -> None:
        self.spec, self.device, self.limit = spec, device, limit
        self._forks = forks and device.on_cpu
        self._context: Any = multiprocessing.get_context("fork" if self._forks else "spawn")
        self._process: Any = None
        self._pipe: Any = None
        self._room = tempfile.TemporaryDirectory(prefix="moe-apart-")
        self._stacks = Path(self._room.name) / "stacks"  #: where every thread was when a process was ended by a signal

    def __enter__(self) -> IsolatedRunner:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self._room.cleanup()

    def anew(self, case: Case) -> Verdict:
        """The verdict of a process that has seen nothing else."""
        self._end()
        return self.run(case)

    def run(self, case: Case) -> Verdict:
        """The verdict; crashed or hung, with the process replaced for the next, if there was none."""
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
            # The process ends itself after its limit; a driver call in which no thread runs is ended from here.
            told = self._pipe.recv() if self._pipe.poll(waiting + GRACE) else self._none(case, "hung", self._hung())
        except (EOFError, OSError):
            told = self._none(case, "crashed", self._how_it_ended())
        if isinstance(told, str):
            raise Broken(told)
        told.spec = self.spec
        if told.status == "hung" or told.reason.startswith("device lost"):
            self._end()
        return told

    def _none(self, case: Case, status: str, reason: str) -> Verdict:
        self._end()
        report = f"{reason}\n{self._stacks.read_text()}" if self._stacks.exists() else reason
        return Verdict(str(case), self.spec, str(self.device), status, reason=reason, report=report)

    def _hung(self) -> str:
        return f"no answer in {self.limit:g} s"

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


def _serve(
    pipe: Connection, forked: Connection | None, spec: str, device: Device, limit: float, stacks: Path, path: list[str]
) -> None:
    """Descriptors in, verdicts out; a str instead is the traceback of what is nobody's verdict."""
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
                verdict = Verdict(str(case), backend.name, str(device), "hung", reason=f"no answer in {limit:g} s")

                def hung(verdict: Verdict = verdict) -> None:
                    verdict.report = f"{verdict.reason}\n{stacks.read_text()}"
                    pipe.send(verdict)
                    os._exit(1)

                with time_limit(limit, hung, dump):
                    try:
                        verdict = run_case(case, backend, device)
                    except DeviceLost as error:
                        verdict.status, verdict.reason = "crashed", f"device lost: {error}"
                        verdict.report = traceback.format_exc()
                pipe.send(verdict)
    except EOFError:  # the parent is done
        return
    except Exception:  # told to the parent, which raises
        pipe.send(traceback.format_exc())
