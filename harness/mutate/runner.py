"""Many mutants, a few at a time, each in a process of its own; this one only listens.

It initialises no GPU and imports no kernels: what it forks must be able to do both in its own way.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any

from harness import device as devices
from harness.device import Device
from harness.mutate import outcomes
from harness.mutate.bugs import Bug, BugError
from harness.mutate.outcomes import Outcome
from harness.mutate.process import Mutant
from harness.mutate.protocol import Asking, Questions, Run
from harness.mutate.schedule import order, seeded, spread

_TICK = 0.25  #: seconds between two looks at the processes that say nothing


@dataclass(frozen=True)
class Task:
    """One entry, and what it is asked."""

    bug: Bug
    questions: Questions
    asking: Asking


def task(bug: Bug, device: Device, asking: Asking, control_runs: int) -> Task:
    """For a bug its most relevant cases first; for a control a spread over all, with seeds dealt over it."""
    others = spread(bug.name, device)
    if bug.control:
        return Task(bug, Questions(tuple(seeded(others))), replace(asking, most=control_runs, more=0))
    return Task(bug, Questions(tuple(order(bug, device)), tuple(others)), asking)


@dataclass
class _Working:
    task: Task
    mutant: Mutant
    runs: list[Run]
    started: float


def run(tasks: list[Task], jobs: int, watch: Callable[[list[str]], None] = lambda names: None) -> Iterator[Outcome]:
    """What comes of each task, as they end, `jobs` of them at a time; `watch` is told now and then who is at work.

    However it ends, by an exception of the caller's too, no process is left.
    """
    waiting = list(reversed(tasks))
    working: dict[Any, _Working] = {}
    try:
        while waiting or working:
            while waiting and len(working) < jobs:
                at = waiting.pop()
                try:
                    mutant = Mutant(at.bug, at.asking, at.questions)
                except BugError as error:
                    yield Outcome(at.bug.name, at.bug.kind, at.bug.source, "broken", reason=str(error))
                else:
                    working[mutant.connection] = _Working(at, mutant, [], time.monotonic())
            watch([w.task.bug.name for w in working.values()])
            ready = wait(list(working), _TICK)
            for connection, w in list(working.items()):
                found = w.mutant.receive() if connection in ready else w.mutant.overdue()
                if found is not None:
                    w.runs.append(found)
                if w.mutant.ended:
                    del working[connection]
                    w.mutant.close()
                    yield outcomes.outcome(w.task.bug, w.runs, time.monotonic() - w.started)
    finally:
        for w in working.values():
            w.mutant.close()


def look(name: str) -> tuple[Device | None, str]:
    """The device of this name, or why it is not here; found by another process, since asking initialises it."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_look, args=(name, there))
    process.start()
    there.close()
    try:
        present, reason = here.recv()
    except EOFError:
        present, reason = False, f"--device {name}: the process that looked for it ended with {process.exitcode}"
    process.join()
    if present or name == "xpu":
        return Device(name, emulated=not present), ""
    return None, reason


def _look(name: str, parent: Any) -> None:
    present = name in devices.present()
    parent.send((present, "" if present else devices.why_absent(name)))
