"""One bug against the suite, in a process of its own: which case notices it, and how.

    python3 -m harness.mutate.play NAME...      what notices these bugs, on the CPU; nothing is stored

The process is forked, with torch and Triton imported and kernels/ not: what it imports as kernels is the copy that holds
the bug. Whatever it does, it does to itself.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness import battery
from harness import device as devices
from harness.device import Device
from harness.mutate.bugs import Bug, read
from harness.problem import Case

#: What says that an edit made the kernels no program, rather than a wrong one.
STILLBORN = ("NameError", "SyntaxError", "CompilationError", "ImportError", "UnboundLocalError")


@dataclass
class Run:
    """One case on one backend."""

    case: str
    backend: str
    family: str
    status: str  #: of a verdict, or died, for a process that ended in it
    reason: str = ""
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)


def order(bug: Bug, device: Device) -> list[battery.Row]:
    """Every row of the suite, those first that have most of what the entry says it takes, and small ones before large.

    Words count by descriptor token, or by the beginning of one: "e4m3" is in "e4m3.block.group"."""

    def relevance(row: battery.Row) -> tuple:
        text = str(row.case)
        hits = sum(any(t == word or t.startswith(word + ".") for t in text.split("-")) for word in bug.words)
        p = row.case.problem
        size = (p.tokens * p.top_k + p.local_experts) * p.hidden_size * p.intermediate_size
        return (-(row.family == bug.family) * (1 + hits), -hits, row.family, size)

    return sorted((row for module in battery.questions() for row in battery.rows(module, device)), key=relevance)


def play(bug: Bug, device_name: str, limit: float, case_limit: float, stop: bool = True) -> Iterator[Run]:
    """Every case that is run, in order, until one is not green (`stop`), the rows end, or `limit` seconds have passed."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="moe-mutant-") as room:
        bug.put_back(Path(room))
        here, there = context.Pipe()
        process = context.Process(target=_child, args=(bug, room, device_name, there, stop), daemon=True)
        process.start()
        there.close()
        end = time.monotonic() + limit
        at: tuple[str, str, str] | None = None
        try:
            while True:
                patience = min(case_limit, max(0.0, end - time.monotonic()) if at is None else case_limit)
                if not here.poll(patience):
                    if at is not None:
                        yield Run(*at, "hung", f"no verdict after {case_limit:.0f} s", case_limit)
                    return
                try:
                    message = here.recv()
                except EOFError:
                    process.join()
                    if at is not None:
                        code = process.exitcode or 0
                        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                        yield Run(*at, "died", f"the process ended with {name}")
                    return
                if isinstance(message, Run):
                    at = None
                    yield message
                    if time.monotonic() > end:
                        return
                else:
                    at = message
        finally:
            if process.is_alive():
                os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
            process.join()


def _child(bug: Bug, room: str, device_name: str, parent: Connection, stop: bool) -> None:
    os.setpgrp()  # killed with whatever it starts
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory ends, it ends this process
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.path.insert(0, room)
    devices.start({device_name})
    import torch

    torch.set_num_threads(1)
    device = Device(device_name)
    from harness import backend as backends
    from harness import check

    chosen = [backends.load(name) for name in bug.backends]
    for row in order(bug, device):
        for backend in chosen:
            if check.why_not(row.case, backend, device):
                continue
            parent.send((str(row.case), backend.name, row.family))
            verdict = check.run(row.case, backend, device, row.family)
            if verdict.status == "unsupported":
                verdict.status = "passed"
            parent.send(
                Run(str(row.case), backend.name, row.family, verdict.status, verdict.reason, verdict.seconds)
            )
            if stop and not verdict.green:
                return


def main(names: list[str]) -> None:
    devices.start({"cpu"})
    known = read()
    for name in names:
        started, last, count = time.monotonic(), None, 0
        for last in play(known[name], "cpu", 120, 60):
            count += 1
        killed = last is not None and last.status in ("failed", "crashed", "hung", "died")
        told = f"{last.status} in {last.case} on {last.backend}: {last.reason}" if killed and last else "SURVIVES"
        if killed and last and any(word in last.reason for word in STILLBORN):
            told = f"STILLBORN, {told}"
        print(f"{name:40} {told} [case {count}, {time.monotonic() - started:.1f} s]", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(read()))
