"""The verdict on one case on one backend: the record that the summary, the results file and the report are made of.

Every set of statuses stands here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from harness.base.text import shortened
from harness.results.bounds import TEXT, bounded

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

#: Characters of a record's texts, at most; of all other texts: bounds.TEXT.
REASON, REPORT, OUTPUT, NOTE = 500, 64_000, 8_000, 500
NOTES = 20  #: notes of a record, at most


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
    output: str = ""  #: what the backend printed during the case, cut
    #: what else happened: a thread or process left behind, an import that changed os.environ
    notes: list[str] = field(default_factory=list)

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
        """JSON-ready, inert and bounded: infinities become the string "inf", long texts are cut."""
        record: dict[str, Any] = bounded({**self.__dict__, "reason": "", "report": "", "output": "", "notes": []}, TEXT)
        record |= {name: " ".join(text.splitlines()) for name, text in record.items() if isinstance(text, str)}
        record["budget"] = _finite(self.budget)
        record["budgets"] = {name: _finite(used) for name, used in self.budgets.items()}
        record["reason"] = shortened(self.reason, REASON)
        record["report"] = shortened(self.report, REPORT, tail=REPORT // 4)
        record["output"] = shortened(self.output, OUTPUT, tail=OUTPUT // 2)
        record["notes"] = [shortened(note, NOTE) for note in self.notes[:NOTES]]
        if len(self.notes) > NOTES:
            record["notes"][-1] = f"and {len(self.notes) - NOTES + 1} notes more"
        return record | {"reproduce": shortened(" ".join(self.reproduce.splitlines()), 3 * TEXT)}


def _finite(used: float) -> float | str:
    return used if math.isfinite(used) else "inf"
