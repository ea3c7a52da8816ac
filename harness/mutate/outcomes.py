"""What came of each mutant, in a file of JSON Lines: one line a mutant, appended when it is done.

A run that is given the file of an earlier one does not repeat what it holds for the same kernels, suite and entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.base.processes import ROOT
from harness.mutate import bugs
from harness.mutate.bugs import Bug
from harness.mutate.protocol import Asking, Run
from harness.results.file import Results, git_commit, read_results

#: What can come of a bug, and of a control. stillborn: the edit made the kernels no program. unasked: not one case ran.
#: broken: the edit does not apply. error: the harness itself failed.
BUG_OUTCOMES = ("killed", "survived")
CONTROL_OUTCOMES = ("accused", "innocent")
ILL_MADE = ("stillborn", "unasked", "broken", "error")


@dataclass
class Outcome:
    """What came of one entry."""

    mutant: str
    kind: str
    source: str
    outcome: str
    by: Run | None = None  #: the run that noticed it, or that shows what is wrong with the entry
    reason: str = ""  #: without a run
    seconds: float = 0.0
    runs: list[Run] = field(default_factory=list)
    digest: str = ""

    @property
    def control(self) -> bool:
        return self.kind == bugs.CONTROLS

    @property
    def accusations(self) -> list[Run]:
        return [run for run in self.runs if run.noticed]

    def record(self) -> dict[str, Any]:
        """Ready for JSON. Reasons are kept for the runs that noticed; the others are many."""
        found = asdict(self)
        for run, kept in zip(self.runs, found["runs"]):
            if not run.telling:
                del kept["reason"]
        return found

    @classmethod
    def of(cls, record: dict[str, Any]) -> Outcome:
        """What `record` was made from."""
        mine = {f.name: record[f.name] for f in fields(cls)}
        mine["by"] = Run(**record["by"]) if record["by"] else None
        mine["runs"] = [Run(**{"reason": "", **run}) for run in record["runs"]]
        return cls(**mine)


def outcome(bug: Bug, runs: list[Run], seconds: float) -> Outcome:
    """What these runs say about an entry."""
    telling = [run for run in runs if run.telling]
    ill_made = [run for run in telling if not run.noticed]
    by = next(iter([*ill_made, *telling]), None)
    if not runs:
        word = "unasked"
    elif ill_made:
        word = ill_made[0].status
    else:
        word = (CONTROL_OUTCOMES if bug.control else BUG_OUTCOMES)[by is None]
    reason = "" if runs else f"none of {', '.join(bug.backends)} answers any case"
    return Outcome(bug.name, bug.kind, bug.source, word, by, reason, round(seconds, 2), runs)


def suite_digest(root: Path = ROOT) -> str:
    """Of all that a run rests on but the entries: our code, the cases, the versions of what they use."""
    found = hashlib.sha256()
    for room in ("kernels", "harness", "cases", "reference"):
        base = bugs.KERNELS if room == "kernels" else root / room
        for path in sorted([*base.rglob("*.py"), *base.rglob("*.toml")]):
            if bugs.BUGS not in path.parents:
                found.update(f"{room}/{path.relative_to(base)}".encode() + b"\0" + path.read_bytes())
    for package in ("torch", "triton", "numpy"):
        found.update(f"{package} {metadata.version(package)}".encode())
    return found.hexdigest()


def digest(bug: Bug, asking: Asking, suite: str) -> str:
    """Of one entry, as it is asked: what else is written about it does not matter."""
    entry = replace(bug, source="", cause="", survives="")
    return hashlib.sha256(f"{suite} {entry} {replace(asking, memory=0)}".encode()).hexdigest()[:16]


class Store:
    """The file, and what it holds already."""

    def __init__(self, path: Path, device: str) -> None:
        records = read_results(path)[0] if path.exists() else []
        self._records = {record["digest"]: record for record in records if "mutant" in record}
        self.path, self._device = path, device
        self._file = Results(path, git_commit(ROOT))

    def known(self, digest: str) -> Outcome | None:
        """What came of the entry with this digest, if the file says."""
        record = self._records.get(digest)
        return Outcome.of(record) if record else None

    def append(self, found: Outcome) -> None:
        self._file.append({"device": self._device, **found.record()})

    def close(self) -> None:
        self._file.close()


def counts(outcomes: Iterable[Outcome]) -> tuple[int, int]:
    """(killed, all) of the bugs that could be asked."""
    asked = [found.outcome for found in outcomes if found.outcome in BUG_OUTCOMES]
    return asked.count("killed"), len(asked)
