"""A worker process as its supervisor sees it: start it, ask it, wait for it, end it, and say how it ended."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from harness.base.processes import describe_exit, environment, fork, kill_group
from harness.base.progress import SIZE, CaseProgress
from harness.device import Device
from harness.results.verdict import OUTPUT, Verdict
from harness.run.worker import CLOSED, Start, serve

STARTING = 300.0  #: seconds for the imports of a spawned worker
OWN = 900.0  #: seconds of the harness itself for one case: its inputs, the expected output, the diagnosis
DIAGNOSIS = 300.0  #: seconds after a failure for its diagnosis, which may call the backend again
STEP = 0.25  #: seconds between two looks at a silent worker
DUMPING = 3.0  #: seconds for a worker that is ended to write where its threads are
PRINTED = 2**30  #: bytes that a case may print
SHOWN = OUTPUT // 2 - 100  #: bytes from the beginning and from the end of what a case printed, for its verdict
MESSAGE = 2**28  #: bytes of a worker's message, at most


class RunnerError(Exception):
    """An error of the harness in the worker, not of a kernel; the message is its traceback."""


@dataclass(frozen=True)
class CaseTask:
    """One case on one backend, and what its verdict needs if the worker cannot give one."""

    case: str
    spec: str
    device: Device
    family: str
    name: str  #: the backend's

    def message(self) -> bytes:
        """The task for the worker."""
        words = {"case": self.case, "spec": self.spec, "family": self.family}
        return json.dumps(words | {"device": self.device.name, "emulated": self.device.emulated}).encode()

    def verdict(self, status: str, reason: str, report: str = "") -> Verdict:
        """A verdict on the task that the worker did not give."""
        device = str(self.device)
        return Verdict(self.case, self.name, device, status, self.family, reason, report or reason, spec=self.spec)


class Ended(Exception):
    """The worker had to be ended; the arguments are the status and the reason of its case."""


class WorkerProcess:
    """A running worker. forked: a copy of this process with its backends `loaded`, otherwise a new interpreter."""

    def __init__(self, start: Start, loaded: Mapping[str, Any], forked: bool) -> None:
        self._files = start = replace(start, path=tuple(sys.path))
        start.progress.write_bytes(bytes(SIZE))
        start.stacks.unlink(missing_ok=True)
        self._progress = CaseProgress()
        with start.progress.open("r+b") as file:
            self._progress.attach(mmap.mmap(file.fileno(), SIZE))
        self._pipe, theirs = Pipe()
        self._exitcode: int | None = None
        self._pid = self._fork(theirs, loaded) if forked else self._spawn(theirs)
        theirs.close()
        self.retires = False  #: its last case left threads behind, which could end another one
        self._ready = False
        self._failed = ""  #: the reason of the running case's failure, while it is diagnosed
        self._failed_at = 0.0  #: of time.monotonic()

    def _fork(self, theirs: Connection, loaded: Mapping[str, Any]) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = fork()
        if pid == 0:
            self._pipe.close()  # or the worker would never see that the supervisor is gone
            serve(theirs, self._files, loaded)
        return pid

    def _spawn(self, theirs: Connection) -> int:
        os.set_inheritable(theirs.fileno(), True)
        words = [sys.executable, "-m", "harness.run.worker", str(theirs.fileno())]
        pid = os.posix_spawn(sys.executable, words, environment())
        self._pipe.send_bytes(json.dumps(asdict(self._files)).encode())
        return pid

    def ask(self, task: CaseTask, limit: float, outputs: Path | None) -> tuple[Verdict, bool]:
        """(the verdict, whether the case ended the worker or its device). RunnerError: the harness is wrong.

        limit: seconds of the backend, 0 for no limit; outputs: a directory for the whole of what a failing case prints.
        """
        self._failed = ""
        try:
            if not self._ready:
                self._receive(limit)
                self._ready = True
            self._pipe.send_bytes(task.message())
            message = self._receive(limit)
            verdict, self.retires = Verdict(**message["verdict"]), message["retires"]
            ended = verdict.device_lost
        except Ended as error:
            verdict, ended = self._stop(task, *error.args), True
        except (EOFError, OSError):
            verdict, ended = self._gone(task), True
        verdict.output = self._printed(verdict, outputs)
        return verdict, ended

    def end(self) -> None:
        """End the process and its children."""
        kill_group(self._pid)
        self._wait(None)
        self._pipe.close()

    # -- waiting ------------------------------------------------------------------------------------------------------
    def _receive(self, limit: float) -> dict[str, Any]:
        """The next answer of the worker. Ended: it must be ended; EOFError, OSError: it is gone."""
        asked = time.monotonic()
        while True:
            if self._pipe.poll(STEP) or (self._wait(0.0) and self._pipe.poll(0)):
                message: dict[str, Any] = json.loads(self._pipe.recv_bytes(MESSAGE))
                if "error" in message:
                    raise RunnerError(message["error"])
                if "failed" not in message:
                    return message
                if not self._failed:
                    self._failed, self._failed_at = message["failed"], time.monotonic()
            elif self._exitcode is not None:
                raise EOFError  # a child of the worker may still hold the pipe open
            else:
                self._look(limit, asked)

    def _look(self, limit: float, asked: float) -> None:
        """Ended, if the worker must not go on."""
        if not self._ready:
            if time.monotonic() - asked > STARTING:
                raise Ended("hung", f"the worker did not start in {STARTING:g} s")
            return
        backend, own = self._progress.seconds()
        if limit and backend > limit:
            raise Ended("hung", f"no answer in {limit:g} s")
        if own > OWN:
            raise Ended("hung", f"the harness took more than {OWN:g} s for inputs, expected output and diagnosis")
        if self._failed and time.monotonic() - self._failed_at > DIAGNOSIS:
            raise Ended("hung", f"it took more than {DIAGNOSIS:g} s")
        if self._files.output.stat().st_size > PRINTED:
            raise Ended("crashed", f"printed more than {PRINTED >> 20} MiB")

    def _wait(self, seconds: float | None) -> bool:
        """Wait until the process has ended, at most so many seconds (None: for ever); whether it has."""
        deadline = time.monotonic() + (seconds or 0.0)
        while self._exitcode is None:
            pid, status = os.waitpid(self._pid, 0 if seconds is None else os.WNOHANG)
            if pid:
                self._exitcode = os.waitstatus_to_exitcode(status)
            elif time.monotonic() >= deadline:
                return False
            else:
                time.sleep(0.01)
        return True

    def _stop(self, task: CaseTask, status: str, reason: str) -> Verdict:
        """The verdict on a case that must not go on: the worker's stacks are its report."""
        os.kill(self._pid, signal.SIGABRT)  # faulthandler writes all stacks, even while no Python runs
        self._wait(DUMPING)
        if self._failed:  # the failure is certain, only its diagnosis is missing
            status, reason = "failed", f"{self._failed} (its diagnosis was ended: {reason})"
        return task.verdict(status, reason, self._with_stacks(reason))

    def _gone(self, task: CaseTask) -> Verdict:
        """The verdict on a case whose worker has ended by itself, or has closed its pipe."""
        if not self._wait(DUMPING) or self._exitcode == CLOSED:
            reason = "the process closed the file descriptor of its pipe"
        else:
            reason = f"the process ended with {describe_exit(self._exitcode or 0)}"
        return task.verdict("crashed", reason, self._with_stacks(reason))

    def _with_stacks(self, reason: str) -> str:
        stacks = self._files.stacks.read_text(errors="replace") if self._files.stacks.exists() else ""
        return f"{reason}\n{stacks}" if stacks else reason

    # -- what it printed ----------------------------------------------------------------------------------------------
    def _printed(self, verdict: Verdict, outputs: Path | None) -> str:
        """The beginning and the end of what a case that is not green printed; `outputs` gets the whole."""
        path = self._files.output
        size = path.stat().st_size if path.exists() else 0
        text = ""
        if size and not verdict.green:
            with path.open("rb") as file:
                head = file.read(SHOWN)
                file.seek(max(SHOWN, size - SHOWN))
                text, tail = (part.decode(errors="replace") for part in (head, file.read(SHOWN)))
            text += f"\n... {size - 2 * SHOWN} bytes more ...\n{tail}" if size > 2 * SHOWN else tail
            if outputs:
                outputs.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, outputs / f"{verdict.backend}-{verdict.case[:200]}.txt")
        if size:
            os.truncate(path, 0)
        return text
