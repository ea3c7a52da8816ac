"""What a mutant is asked, and what one of its answers looks like: the words that both its process and ours use."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from harness.problem.families import CaseRow

#: How a bug is noticed. failed: a wrong output. promise: something else that was promised, seen in a trace or in what a
#: stage hands on (a canary, an argument that was written to, an allocation, another path, a tail that is not -1).
#: crashed: an exception. died: the process. structure: another number of launches, allocations, operators, waits,
#: copies, Python calls, or other tiles.
NOTICED = ("failed", "promise", "crashed", "hung", "died", "structure")
MORE = 30  #: runs of a bug that go on after one has noticed it, where they do
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  #: bytes of this machine
START = ("the import of its kernels", "", "")  #: where a process is before its first case: case, backend, family


@dataclass
class Run:
    """One case on one backend."""

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
    def telling(self) -> bool:
        """Whether it says anything else than that all is well."""
        return self.noticed or self.status in ("stillborn", "error")


@dataclass(frozen=True)
class Questions:
    """Cases in the order in which they are asked, and others for when it is known whether the bug is noticed."""

    rows: tuple[CaseRow, ...]
    others: tuple[CaseRow, ...] = ()


@dataclass(frozen=True)
class Asking:
    """How long and how much a mutant is asked."""

    device: str = "cpu"
    limit: float = 120.0  #: seconds for its cases (interpreted: of its own CPU time); counting calls comes on top
    case_limit: float = 60.0  #: seconds for one case
    most: int = 0  #: of a control: runs
    more: int = 0  #: of a bug: runs after the first that notices it, half of them of the questions' others
    rules: tuple[str, ...] = ()  #: of mutate/field_rules.py, to judge the same outputs
    memory: int = MEMORY // 2  #: bytes that it may hold
