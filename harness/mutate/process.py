"""One bug against the suite, in a process of its own.

The process is forked after torch and Triton are imported, and before kernels/ is: it imports the copy of kernels/ that
holds the bug. A mutant that crashes, hangs or takes all memory ends only its own process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness.device import Device
from harness.mutate import structure, worker
from harness.mutate.bugs import Bug
from harness.mutate.protocol import START, MutantRun, Schedule, Settings
from harness.mutate.structure import Counts

_TICK = 0.25  #: seconds between two looks at what a process uses
_PATIENCE = 5  #: a case that waits, rather than computes, may take this many times its limit


class Mutant:
    """A process that runs cases on the kernels with one bug.

    Wait for `connection` to become readable, then call `receive`; call `overdue` now and then in between.
    """

    def __init__(self, bug: Bug, settings: Settings, schedule: Schedule | None = None) -> None:
        """Copy kernels/ with the bug, and start the process.

        schedule: the cases to run; None to count what the calls do, of unmodified kernels. BugError if the bug does not
        apply.
        """
        self.bug, self.settings = bug, settings
        self._directory = tempfile.TemporaryDirectory(prefix="moe-mutant-")
        bug.put_back(Path(self._directory.name))
        self.connection, child_end = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=worker.run_worker, args=(bug, settings, schedule, self._directory.name, child_end), daemon=True
        )
        self._process.start()
        child_end.close()
        self._at = START
        self.ended = False
        self._restart_clock()

    def receive(self) -> MutantRun | None:
        """Return a run that has ended, or None after any other message. Sets `ended` after the last message."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.ended = True
            self._process.join()
            code = self._process.exitcode or 0
            if not code:
                return None
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return MutantRun(*self._at, "died", f"the process ended with {name}")
        self._restart_clock()
        if isinstance(message, MutantRun):
            self._at = ("the code after a case", "", "")
            return message if message.status != "unsupported" else None
        if message == worker.WANTS_COUNTS:
            self.connection.send(unmodified_counts(self.settings.device, self.bug.backends))
            self._restart_clock()
        else:
            self._at = message
        return None

    def overdue(self) -> MutantRun | None:
        """Return the current run if it exceeds its limit of time or memory, and set `ended`; otherwise None."""
        seconds, limit = time.monotonic() - self._last_message, self.settings.case_limit
        # CPU time counts, or a busy machine would make a case hang; wall time, for a case that waits for ever.
        if self._cpu_seconds() - self._cpu_before > limit or seconds > _PATIENCE * limit:
            run = MutantRun(*self._at, "hung", f"no verdict after {limit:.0f} s", seconds)
        elif self._resident_bytes() > self.settings.memory:
            reason = f"it held more than {self.settings.memory / 2**30:.1f} GiB of memory"
            run = MutantRun(*self._at, "died", reason, seconds)
        else:
            return None
        self.ended = True
        return run

    def _restart_clock(self) -> None:
        self._last_message, self._cpu_before = time.monotonic(), self._cpu_seconds()

    def _cpu_seconds(self) -> float:
        """CPU time that the process has used, in seconds."""
        user, system = self._proc("stat").rpartition(")")[2].split()[11:13] or (0, 0)
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _resident_bytes(self) -> int:
        pages = self._proc("statm").split()[1:2] or ("0",)
        return int(pages[0]) * os.sysconf("SC_PAGE_SIZE")

    def _proc(self, file: str) -> str:
        """The text of a file of /proc about the process; "" once it has ended (`receive` notices the end)."""
        try:
            return Path(f"/proc/{self._process.pid}/{file}").read_text()
        except OSError:
            return ""

    def close(self) -> None:
        """End the process and its children, and remove its copy of the kernels."""
        if self._process.is_alive():
            try:
                os.killpg(self._process.pid or 0, signal.SIGKILL)
            except ProcessLookupError:  # not yet a group of its own
                self._process.kill()
        self._process.join()
        self.connection.close()
        self._directory.cleanup()


def runs_of(mutant: Mutant) -> Iterator[MutantRun]:
    """Yield the runs of one mutant as they end, and close it."""
    try:
        while not mutant.ended:
            run = mutant.receive() if mutant.connection.poll(_TICK) else mutant.overdue()
            if run is not None:
                yield run
    finally:
        mutant.close()


def unmodified_counts(device_name: str, specs: tuple[str, ...]) -> Counts:
    """Return what the calls of the unmodified kernels do, counted once, in a process of its own."""
    missing = tuple(spec for spec in specs if (device_name, spec) not in _UNMODIFIED)
    if missing:
        unmodified = Bug("unmodified", "", "", (), structure.FAMILY, (), missing)
        counts: Counts = {}
        for run in runs_of(Mutant(unmodified, Settings(device_name))):
            if run.decisive:
                raise RuntimeError(f"{run.case} on {run.backend}: {run.status} without any bug: {run.reason}")
            counts[run.case, run.backend] = run.more["counts"]
        for spec in missing:
            _UNMODIFIED[device_name, spec] = {key: value for key, value in counts.items() if key[1] == spec}
    return {key: value for spec in specs for key, value in _UNMODIFIED[device_name, spec].items()}


_UNMODIFIED: dict[tuple[str, str], Counts] = {}


def preload(device: Device) -> None:
    """Import what every mutant needs, once, before they are forked. Initialises no GPU: each mutant does."""
    if device.interprets_triton:
        from harness.trace import interpreter

        interpreter.enable()
        import torch._dynamo  # noqa: F401  the first operator under a dispatch mode imports it, in two seconds
