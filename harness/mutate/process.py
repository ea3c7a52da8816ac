"""One bug against the suite, in a process of its own: which case notices it, and how.

    python3 -m harness.mutate.process NAME...      what notices these bugs, on the CPU; nothing is stored

The process is forked, with torch and Triton imported and kernels/ not: what it imports as kernels is the copy that
holds the bug. Whatever it does, it does to itself: it may crash, hang, or take all memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from harness.device import Device
from harness.mutate import structure, worker
from harness.mutate.bugs import Bug, BugError, read
from harness.mutate.protocol import MORE, START, Asking, Questions, Run
from harness.mutate.schedule import order, spread
from harness.mutate.structure import Counts

_TICK = 0.25  #: seconds between two looks at what a process uses
_PATIENCE = 5  #: how much longer than its limit a case may take that does not work, but waits


class Mutant:
    """A bug at work in a process of its own. `connection` can be waited for; `receive` then says what came."""

    def __init__(self, bug: Bug, asking: Asking, questions: Questions | None = None) -> None:
        """questions: None to count what the calls do, as of kernels that are right. BugError if it does not apply."""
        self.bug, self.asking = bug, asking
        self._room = tempfile.TemporaryDirectory(prefix="moe-mutant-")
        bug.put_back(Path(self._room.name))
        self.connection, there = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("fork").Process(
            target=worker.work, args=(bug, asking, questions, self._room.name, there), daemon=True
        )
        self._process.start()
        there.close()
        self._at = START
        self.ended = False
        self._listen()

    def receive(self) -> Run | None:
        """What the process says, if it is a run that ended; `ended` is set once nothing will follow."""
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.ended = True
            self._process.join()
            code = self._process.exitcode or 0
            if not code:
                return None
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Run(*self._at, "died", f"the process ended with {name}")
        self._listen()
        if isinstance(message, Run):
            self._at = ("what comes after a case", "", "")
            return message if message.status != "unsupported" else None
        if message == worker.WANTS_COUNTS:
            self.connection.send(right_counts(self.asking.device, self.bug.backends))
            self._listen()
        else:
            self._at = message
        return None

    def overdue(self) -> Run | None:
        """The run that took too long or too much memory, which has then ended the process; None if all is well."""
        seconds, limit = time.monotonic() - self._heard, self.asking.case_limit
        # Its own time counts, or a busy machine would make it hang; but for one that waits for what never comes.
        if self._worked() - self._worked_before > limit or seconds > _PATIENCE * limit:
            found = Run(*self._at, "hung", f"no verdict after {limit:.0f} s", seconds)
        elif self._resident() > self.asking.memory:
            held = f"it held more than {self.asking.memory / 2**30:.1f} GiB of memory"
            found = Run(*self._at, "died", held, seconds)
        else:
            return None
        self.ended = True
        return found

    def _listen(self) -> None:
        self._heard, self._worked_before = time.monotonic(), self._worked()

    def _worked(self) -> float:
        """Seconds of CPU time that the process has used."""
        user, system = self._told("stat").rpartition(")")[2].split()[11:13] or (0, 0)
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def _resident(self) -> int:
        pages = self._told("statm").split()[1:2] or ("0",)
        return int(pages[0]) * os.sysconf("SC_PAGE_SIZE")

    def _told(self, file: str) -> str:
        """What the system tells about the process; "" once it has ended, of which its connection tells."""
        try:
            return Path(f"/proc/{self._process.pid}/{file}").read_text()
        except OSError:
            return ""

    def close(self) -> None:
        """End the process, with whatever it started, and remove its copy of the kernels."""
        if self._process.is_alive():
            try:
                os.killpg(self._process.pid or 0, signal.SIGKILL)
            except ProcessLookupError:  # not yet a group of its own
                self._process.kill()
        self._process.join()
        self.connection.close()
        self._room.cleanup()


def play(bug: Bug, device_name: str, limit: float, case_limit: float, stop: bool = True) -> Iterator[Run]:
    """Every case that is run, in order, until one notices, the rows end, or `limit` seconds have passed; without
    `stop` some more then."""
    device = Device(device_name)
    asking = Asking(device_name, limit, case_limit, more=0 if stop else MORE)
    yield from listen(Mutant(bug, asking, Questions(tuple(order(bug, device)), tuple(spread(bug.name, device)))))


def listen(mutant: Mutant) -> Iterator[Run]:
    """What one mutant says until it ends."""
    try:
        while not mutant.ended:
            run = mutant.receive() if mutant.connection.poll(_TICK) else mutant.overdue()
            if run is not None:
                yield run
    finally:
        mutant.close()


def right_counts(device_name: str, specs: tuple[str, ...]) -> Counts:
    """What the kernels as they are do, by case and backend: counted once, in a process of its own."""
    missing = tuple(spec for spec in specs if (device_name, spec) not in _RIGHT)
    if missing:
        found: Counts = {}
        for run in listen(Mutant(Bug("as they are", "", "", (), structure.FAMILY, (), missing), Asking(device_name))):
            if run.telling:
                raise RuntimeError(f"{run.case} on {run.backend}: {run.status} without any bug: {run.reason}")
            found[run.case, run.backend] = run.more["counts"]
        for spec in missing:
            _RIGHT[device_name, spec] = {key: value for key, value in found.items() if key[1] == spec}
    return {key: value for spec in specs for key, value in _RIGHT[device_name, spec].items()}


_RIGHT: dict[tuple[str, str], Counts] = {}


def prepare(device: Device) -> None:
    """Import what every mutant needs, once, before they are forked. Nothing of a GPU: each initialises its own."""
    if device.interprets_triton:
        from harness.trace import interpreter

        interpreter.enable()
        import torch._dynamo  # noqa: F401  as does the first operator under a dispatch mode, for two seconds


def main(names: list[str]) -> int:
    """The command line of this module: 1 if a bug survives, 2 for an entry that is none."""
    prepare(Device("cpu"))
    known = read()
    survived = 0
    for name in names or known:
        started, last, count = time.monotonic(), None, 0
        try:
            if name not in known:
                raise BugError(f"{name}: no such entry in cases/bugs")
            for run in play(known[name], "cpu", 120, 60):
                last, count = run, count + 1
        except BugError as error:
            print(error, file=sys.stderr)
            return 2
        told = "SURVIVES"
        if last is not None and last.telling:
            status = last.status if last.noticed else last.status.upper()
            told = f"{status} in {last.case} on {last.backend}: {last.reason}"
        survived += told == "SURVIVES"
        print(f"{name:40} {told} [case {count}, {time.monotonic() - started:.1f} s]", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
