"""Runs several mutants at a time, each in a process of its own.

The parent process initialises no GPU and imports no kernels: each process that it forks does both by itself.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from harness import device as devices
from harness.device import Device
from harness.mutate.bugs import Bug, BugError
from harness.mutate.outcomes import Outcome, outcome_of
from harness.mutate.process import Mutant
from harness.mutate.protocol import MutantRun, Schedule, Settings
from harness.mutate.schedule import by_relevance, seeded, spread

_TICK = 0.25  #: seconds between two looks at the processes that send nothing


@dataclass(frozen=True)
class Task:
    """One entry, its cases and its limits."""

    bug: Bug
    schedule: Schedule
    settings: Settings


def make_task(bug: Bug, device: Device, settings: Settings, control_runs: int) -> Task:
    """Schedule the most relevant cases of a bug first; for a control, a spread over all cases and seeds."""
    others = spread(bug.name, device)
    if bug.control:
        return Task(bug, Schedule(tuple(seeded(others))), replace(settings, control_runs=control_runs, more=0))
    return Task(bug, Schedule(tuple(by_relevance(bug, device)), tuple(others)), settings)


@dataclass
class _Running:
    task: Task
    mutant: Mutant
    runs: list[MutantRun]
    started: float


def run(tasks: list[Task], jobs: int, watch: Callable[[list[str]], None] = lambda names: None) -> Iterator[Outcome]:
    """Yield the outcome of each task as it ends, with `jobs` tasks at a time.

    Calls `watch` several times a second with the names of the running entries. Ends every process, also after an
    exception of the caller's.
    """
    waiting = list(reversed(tasks))
    running: dict[Any, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop()
                try:
                    mutant = Mutant(task.bug, task.settings, task.schedule)
                except BugError as error:
                    yield Outcome(task.bug.name, task.bug.kind, task.bug.source, "broken", reason=str(error))
                else:
                    running[mutant.connection] = _Running(task, mutant, [], time.monotonic())
            watch([r.task.bug.name for r in running.values()])
            ready = wait(list(running), _TICK)
            for connection, r in list(running.items()):
                ended = r.mutant.receive() if connection in ready else r.mutant.overdue()
                if ended is not None:
                    r.runs.append(ended)
                if r.mutant.ended:
                    del running[connection]
                    r.mutant.close()
                    yield outcome_of(r.task.bug, r.runs, time.monotonic() - r.started)
    finally:
        for r in running.values():
            r.mutant.close()


def find_device(name: str) -> tuple[Device | None, str]:
    """Return (device, ""), or (None, the reason why it is absent).

    Another process looks for it, because looking initialises the device.
    """
    parent_end, child_end = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_look, args=(name, child_end))
    process.start()
    child_end.close()
    try:
        present, reason = parent_end.recv()
    except EOFError:
        present, reason = False, f"--device {name}: the process that looked for it ended with {process.exitcode}"
    process.join()
    if present or name == "xpu":
        return Device(name, emulated=not present), ""
    return None, reason


def _look(name: str, parent: Connection) -> None:
    present = name in devices.present()
    parent.send((present, "" if present else devices.why_absent(name)))
