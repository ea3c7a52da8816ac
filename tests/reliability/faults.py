"""The catalogue of faults: one misbehaviour of a backend each, with the verdict that its case must get.

    FAULTS: name -> Fault; act() runs at one case of the backend of backend.py, in the method `where`

ends.py, raises.py, changes.py and litter.py fill it (catalogue.py). The tables of docs/reliability.md list it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The environment variable that names a run's folder: it holds MAP and the files that backends leave there.
FOLDER = "MOE_FAULTS"
MAP = "faults.json"  #: {descriptor: name of the fault, or "" for a case without one}
PIDS = "pids"  #: of the processes that faults have left behind
STARTS = "starts"  #: a line for each case that has begun
#: How --backend names the backends of backend.py, which only the processes that run cases import.
FAULTY, HONEST, COUNTED = (f"tests.reliability.backend:{name}" for name in ("Faulty", "Honest", "Counted"))


@dataclass(frozen=True)
class Fault:
    """One misbehaviour. act() runs in the method `where` of a backend, whose own work follows unless it raises."""

    group: str
    name: str
    act: Callable[[], Any]
    statuses: tuple[str, ...]  #: that the verdict may have
    where: str = "call"
    answers: bool = False  #: what act() returns is the answer of the method
    notes: bool = False  #: the record must have a note of it


FAULTS: dict[str, Fault] = {}


def add(
    group: str, name: str, act: Callable[[], Any], *statuses: str, where: str = "call", answers: bool = False,
    notes: bool = False,
) -> None:  # fmt: skip
    """Put a fault into the catalogue. statuses: those that its verdict may have (crashed)."""
    assert name not in FAULTS, name
    FAULTS[name] = Fault(group, name, act, statuses or ("crashed",), where, answers, notes)


_folders: list[Path] = []


def settle() -> Path:
    """Take the run's folder from the environment, before a fault changes that."""
    _folders[:] = [Path(os.environ[FOLDER])]
    return _folders[0]


def folder() -> Path:
    """The run's folder."""
    return _folders[0]


def leave(process: subprocess.Popen[bytes] | int) -> None:
    """Write down a process that is left behind."""
    pid = process if isinstance(process, int) else process.pid
    with (folder() / PIDS).open("a") as file:
        file.write(f"{pid}\n")
