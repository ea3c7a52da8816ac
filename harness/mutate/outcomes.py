"""The outcome of each mutant, and the file that stores it: JSON Lines, one line a mutant, appended when it ends.

A later run with the same file does not repeat an entry whose kernels, suite and text are unchanged.
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
from harness.mutate.protocol import MutantRun, Settings
from harness.results.bounds import bounded
from harness.results.file import SCHEMA, JsonLines, now
from harness.results.reader import read_results

#: The outcomes of a bug and of a control (correct variant): of each pair, the first if a case noticed it.
BUG_OUTCOMES = ("killed", "survived")
CONTROL_OUTCOMES = ("accused", "innocent")
#: stillborn: the edit leaves no valid program. unasked: not one case ran. broken: the edit does not apply. error: the
#: harness itself failed.
ILL_MADE = ("stillborn", "unasked", "broken", "error")


@dataclass
class Outcome:
    """The outcome of one entry."""

    mutant: str
    kind: str
    source: str
    outcome: str
    by: MutantRun | None = None  #: the run that noticed the bug, or that shows what is wrong with the entry
    reason: str = ""  #: without a run
    seconds: float = 0.0
    runs: list[MutantRun] = field(default_factory=list)
    digest: str = ""

    @property
    def control(self) -> bool:
        return self.kind == bugs.CONTROLS

    @property
    def accusations(self) -> list[MutantRun]:
        return [run for run in self.runs if run.noticed]

    def record(self) -> dict[str, Any]:
        """Return a dict for JSON. Only decisive runs keep their reason: the others are many."""
        record = asdict(self)
        for run, stored in zip(self.runs, record["runs"]):
            if not run.decisive:
                del stored["reason"]
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Outcome:
        """The inverse of `record`."""
        values = {f.name: record[f.name] for f in fields(cls)}
        values["by"] = MutantRun(**record["by"]) if record["by"] else None
        values["runs"] = [MutantRun(**{"reason": "", **run}) for run in record["runs"]]
        return cls(**values)


def outcome_of(bug: Bug, runs: list[MutantRun], seconds: float) -> Outcome:
    """Return the outcome of an entry after these runs, which took `seconds`."""
    decisive = [run for run in runs if run.decisive]
    ill_made = [run for run in decisive if not run.noticed]
    by = next(iter([*ill_made, *decisive]), None)
    if not runs:
        word = "unasked"
    elif ill_made:
        word = ill_made[0].status
    else:
        word = (CONTROL_OUTCOMES if bug.control else BUG_OUTCOMES)[by is None]
    reason = "" if runs else f"none of {', '.join(bug.backends)} supports any case"
    return Outcome(bug.name, bug.kind, bug.source, word, by, reason, round(seconds, 2), runs)


def suite_digest(root: Path = ROOT) -> str:
    """Return the SHA-256 of what every outcome depends on: code, cases and package versions, without the entries."""
    digest = hashlib.sha256()
    for folder in ("kernels", "harness", "cases", "reference"):
        base = bugs.KERNELS if folder == "kernels" else root / folder
        for path in sorted([*base.rglob("*.py"), *base.rglob("*.toml")]):
            if bugs.BUGS not in path.parents:
                digest.update(f"{folder}/{path.relative_to(base)}".encode() + b"\0" + path.read_bytes())
    for package in ("torch", "triton", "numpy"):
        digest.update(f"{package} {metadata.version(package)}".encode())
    return digest.hexdigest()


def entry_digest(bug: Bug, settings: Settings, suite: str) -> str:
    """Return 16 digits of the SHA-256 of what one outcome depends on: not the source, the cause or the explanation."""
    entry = replace(bug, source="", cause="", survives="")
    return hashlib.sha256(f"{suite} {entry} {replace(settings, memory=0)}".encode()).hexdigest()[:16]


class OutcomesFile:
    """The stored outcomes of earlier runs, and a place for new ones. Without a path it is empty and stores nothing."""

    def __init__(self, path: Path | None, device: str) -> None:
        stored = read_results(path).outcomes if path and path.exists() else []
        self._records = {digest: record for record in stored if (digest := record["outcome"].get("digest"))}
        self._device = device
        self._file = JsonLines(path) if path else None

    def get(self, digest: str) -> Outcome | None:
        """Return the stored outcome with this digest, if there is one."""
        record = self._records.get(digest)
        return Outcome.from_record(record["outcome"]) if record else None

    def append(self, outcome: Outcome) -> None:
        if self._file:
            facts = {"schema": SCHEMA, "kind": "outcome", "time": now(), "device": self._device}
            self._file.write({**facts, "outcome": bounded(outcome.record())})

    def close(self) -> list[str]:
        """Close the file. Returns a line if it lacks an outcome."""
        return self._file.finish() if self._file else []


def count_killed(outcomes: Iterable[Outcome]) -> tuple[int, int]:
    """Return (killed, killed and survived)."""
    words = [outcome.outcome for outcome in outcomes if outcome.outcome in BUG_OUTCOMES]
    return words.count("killed"), len(words)
