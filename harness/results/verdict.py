"""The verdict on one case on one backend: the record that the summary, the results file and the report are made of.

Every set of statuses stands here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

#: What a statistic of oracle/judge.py means, for the reader of a failure.
STATISTICS = {
    "rho": "the largest deviation",
    "rms": "the root mean square deviation",
    "median": "the median row's deviation",
    "count": "the number of disturbed rows",
    "slope": "a scale error common to all rows",
}
#: passed, failed: judged. mistrusted: matched, but vacuously: the output proves little. unsupported: not run, with a
#: reason of backend.UNSUPPORTED. crashed: an exception, or the device was lost. hung: the time limit. known: it failed
#: as an entry of the known failures says (results/known_failures.py).
STATUSES = ("passed", "failed", "mistrusted", "unsupported", "crashed", "hung", "known")
GREEN = ("passed", "mistrusted", "unsupported", "known")
CORRECT = ("passed", "mistrusted")  #: every output was right
FAILED = ("failed", "crashed", "hung")
JUDGED = ("passed", "failed", "mistrusted")
NOT_EXECUTED = ("unsupported",)
ENDS = ("crashed", "hung")  #: failures that may end the process


@dataclass
class Verdict:
    """One verdict. `budget` is the share of the error budget used by the worst statistic: above 1 is a failure."""

    case: str
    backend: str
    device: str
    status: str
    family: str = ""
    reason: str = ""  #: one line: what failed, or why it did not run
    report: str = ""  #: many lines, for debugging
    budget: float = 0.0  #: of the worst statistic of the worst call
    statistic: str = ""
    budgets: dict[str, float] = field(default_factory=dict)  #: of every statistic, over all calls
    plan: str = ""
    seconds: float = 0.0
    calls: int = 0  #: calls of the backend that were judged
    trace: dict[str, Any] = field(default_factory=dict)
    perf: dict[str, Any] = field(default_factory=dict)  #: what was timed after the case had passed (perf/benchmark.py)
    error_map: dict[str, Any] = field(default_factory=dict)  #: of a failed call (diagnose/error_map.py)
    cause: str = ""  #: the mistake that a failed call's output looks like (diagnose/match.py)
    stage: str = ""  #: the first of its stages that is wrong by itself (diagnose/localise.py)
    known: str = ""  #: why it is "known": from the entry that covers it (results/known_failures.py)
    spec: str = ""  #: how --backend named the backend: a name, or package.module:object
    error_type: str = ""  #: of a crash: the class name of the exception, such as "NameError"
    device_lost: bool = False  #: of a crash: nothing after it can run in this process

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status={self.status!r}: one of {', '.join(STATUSES)}")

    @property
    def green(self) -> bool:
        return self.status in GREEN

    @property
    def details(self) -> str:
        """The report without the reason that it starts with."""
        return self.report.rstrip().removeprefix(self.reason).strip("\n")

    @property
    def reproduce(self) -> str:
        """The one line that runs this case again."""
        device = self.device.split()[0]
        return f"python3 -m harness run {self.case} --backend {self.spec or self.backend} --device {device}"

    def record(self) -> dict[str, Any]:
        """JSON-ready: infinities become the string "inf"."""
        record = asdict(self) | {"reproduce": self.reproduce}
        record["budget"] = _finite(self.budget)
        record["budgets"] = {name: _finite(used) for name, used in self.budgets.items()}
        return record


def _finite(used: float) -> float | str:
    return used if math.isfinite(used) else "inf"
