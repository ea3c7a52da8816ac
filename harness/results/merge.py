"""Merge results files of any number of runs and machines.

Nothing is dropped silently: lines cut off by a crash, records that are not valid or occur twice, and runs that are not
whole give one line of each kind, with a count.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.base.text import cut, number
from harness.results import runs
from harness.results.file import Record, ResultsError
from harness.results.reader import Reader, seconds
from harness.results.runs import RunRecords
from harness.results.verdict import GREEN

ABOUT = ("run", "row", "device", "family", "backend", "case")


@dataclass
class Merged:
    """The verdicts of results files, by time, and their runs, the first to begin first."""

    records: list[Record]
    runs: list[RunRecords]
    remarks: list[str]  #: what was left out and does not change the result
    invalid: list[str]  #: lines about records that are not valid and files without any

    @property
    def problems(self) -> list[str]:
        """Lines about all that makes a result red beside its verdicts: also runs that are not whole."""
        return self.invalid + runs.problems(self.runs)


def merge(paths: Iterable[str | Path]) -> Merged:
    """Merge these files, directories (every *.jsonl below) and patterns.

    ResultsError: a path matches no file, or a file that is not a results file.
    """
    reader, verdicts = Reader(), _Verdicts()
    every = [r for path in files(paths) for r in reader.records(path) if r["kind"] != "outcome"]
    every.sort(key=lambda record: seconds(str(record.get("time", ""))))
    grouped = runs.group(every)
    for record in every:
        if record["kind"] == "verdict":
            verdicts.add(record)
    return Merged(
        list(verdicts.records.values()),
        grouped,
        reader.remarks() + verdicts.remarks() + runs.remarks(grouped),
        reader.problems(),
    )


def files(paths: Iterable[str | Path]) -> list[Path]:
    """The files of these paths, directories and patterns, each once. ResultsError: one of them matches no file."""
    every: dict[Path, Path] = {}
    for text in map(str, paths):
        path = Path(text)
        try:
            if path.is_dir():
                here = sorted(file for file in path.rglob("*.jsonl") if not file.is_dir())
                valid = "a directory must have *.jsonl files below it"
            else:
                here = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(text, recursive=True))]
                valid = "no such file, directory, or file of this pattern"
            every |= {file.resolve(): file for file in here}
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise ResultsError(f"{cut(text, 200)}: {getattr(error, 'strerror', None) or error}") from error
        if not here:
            raise ResultsError(f"{cut(text, 200)}: {valid}")
    return list(every.values())


class _Verdicts:
    """The records by their identity: a run has one record of each case, backend and device."""

    def __init__(self) -> None:
        self.records: dict[tuple[str, ...], Record] = {}
        self.same = self.other = 0
        self.example = ""

    def add(self, record: Record) -> None:
        key = identity(record)
        known = self.records.setdefault(key, record)
        if known is record:
            return
        if known == record:
            self.same += 1
            return
        self.other += 1
        self.example = self.example or f"{record['case']} on {record['backend']}"
        # The later record wins, but a green repetition never hides a red verdict.
        if known["status"] in GREEN or record["status"] not in GREEN:
            self.records[key] = record

    def remarks(self) -> list[str]:
        lines = []
        if self.same:
            lines.append(f"{number(self.same, 'record')} there a second time, counted once")
        if self.other:
            kept = "the red one counts, else the later"
            lines.append(f"{number(self.other, 'record')} written again by the same run, {kept}: {self.example}")
        return lines


def identity(record: Record) -> tuple[str, ...]:
    """Equal for two records of one case (its seed included) on one backend and device in one run.

    The environment counts: the name of a run is a time and a process id, which two machines may share.
    """
    environment = record.get("environment") or {}
    where = [environment.get(name, "") for name in ("host", "device_name", "python", "torch", "triton")]
    return tuple(map(str, [*(record.get(name, "") for name in ABOUT), *where]))
