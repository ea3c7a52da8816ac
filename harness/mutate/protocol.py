"""The settings of a mutant's process, and the messages that it sends to its parent."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from harness.problem.families import CaseRow

#: How a bug is noticed. failed: a wrong output. promise: another promise is broken, as a trace or the output of a stage
#: shows (a canary, a modified argument, an allocation, another path, a tail that is not -1). crashed: an exception.
#: died: the process ended. structure: another number of launches, allocations, operators, waits, copies or Python
#: calls, or other tiles.
NOTICED = ("failed", "promise", "crashed", "hung", "died", "structure")
MORE = 30  #: runs after the first one that notices a bug, with --all or --against
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  #: bytes of this machine
START = ("the import of its kernels", "", "")  #: (case, backend, family) of a process before its first case


@dataclass
class MutantRun:
    """The result of one case on one backend."""

    case: str
    backend: str
    family: str
    status: str  #: passed or mistrusted, one of NOTICED, stillborn, or error: the harness itself failed
    reason: str = ""
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def noticed(self) -> bool:
        return self.status in NOTICED

    @property
    def decisive(self) -> bool:
        """Whether the run decides the outcome of a bug: the case noticed it, or could not judge it."""
        return self.noticed or self.status in ("stillborn", "error")


@dataclass(frozen=True)
class Schedule:
    """The cases to run, in order; and others, to run once the first ones have ended."""

    rows: tuple[CaseRow, ...]
    others: tuple[CaseRow, ...] = ()


@dataclass(frozen=True)
class Settings:
    """The device and the limits of a mutant's process."""

    device: str = "cpu"
    limit: float = (
        120.0  #: seconds for all cases (interpreted: CPU time of the process); counting calls is not included
    )
    case_limit: float = 60.0  #: seconds for one case
    control_runs: int = 0  #: of a control: runs
    more: int = 0  #: of a bug: runs after the first one that notices it, half of them from Schedule.others
    rules: tuple[str, ...] = ()  #: names of mutate/field_rules.py, which judge the same outputs
    memory: int = MEMORY // 2  #: bytes that the process may hold
