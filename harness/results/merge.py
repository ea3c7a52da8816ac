"""Merge results files of any number of runs and machines.

Nothing is dropped silently: lines cut off by a crash, records that occur twice and records of other versions give one
remark of each kind, with a count.
"""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from harness.base.text import number
from harness.results.file import SCHEMA, Record, ResultsError
from harness.results.verdict import GREEN, STATUSES

START = '{"schema":'  #: of every line that results/file.py writes
ABOUT = ("run", "row", "device", "family", "backend", "case")
NEEDED = ("case", "backend", "device", "status")
#: Fields whose values many records share: each value is kept once in memory.
SHARED = ("environment", "trace", "ceilings", "clocks")


def merge(paths: Iterable[str | Path]) -> tuple[list[Record], list[str]]:
    """The records of these files, directories (every *.jsonl below) and patterns, by time; and remarks.

    ResultsError: a path matches no file, or a file that is not a results file.
    """
    reader, merged = _Reader(), _Merged()
    for path in files(paths):
        for record in reader.records(path):
            merged.add(record)
    records = sorted(merged.records.values(), key=lambda record: str(record.get("time", "")))
    return records, reader.remarks() + merged.remarks()


def files(paths: Iterable[str | Path]) -> list[Path]:
    """The files of these paths, directories and patterns, each once. ResultsError: one of them matches no file."""
    every: dict[Path, Path] = {}
    for text in map(str, paths):
        path = Path(text)
        if path.is_dir():
            here = sorted(path.rglob("*.jsonl"))
            valid = "a directory must have *.jsonl files below it"
        else:
            here = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(text, recursive=True))]
            valid = "no such file, directory, or file of this pattern"
        if not here:
            raise ResultsError(f"{text}: {valid}")
        every |= {file.resolve(): file for file in here}
    return list(every.values())


class _Reader:
    """Reads files line by line, and counts the lines that it cannot use."""

    def __init__(self) -> None:
        self.cut: list[str] = []
        self.older: Counter[int] = Counter()
        self.unknown: Counter[str] = Counter()
        self.incomplete: list[str] = []
        self.empty: list[str] = []
        self.pool: dict[Any, Any] = {}

    def records(self, path: Path) -> Iterator[Record]:
        written = False
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for at, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    if not written and not line.startswith(START):
                        raise ResultsError(
                            f"{path}: no results file: line {at} begins {line[:40].rstrip()!r}, not {START!r}"
                        )
                    written = True
                    if record := self._record(line, f"{path}:{at}"):
                        yield record
        except OSError as error:
            raise ResultsError(f"{path}: {error.strerror}") from error
        if not written:
            self.empty.append(str(path))

    def _record(self, line: str, place: str) -> Record | None:
        record = _parsed(line)
        if record is None:
            # In joined files, the remains of a cut line may precede a whole record on its line.
            self.cut.append(place)
            record = _parsed(line[line.rfind(START) :]) if line.rfind(START) > 0 else None
            if record is None:
                return None
        if record.get("kind", "verdict") != "verdict":
            return None
        schema = record.get("schema")
        if type(schema) is not int or not 1 <= schema <= SCHEMA:
            self.unknown[json.dumps(schema)] += 1
            return None
        if not all(isinstance(record.get(name), str) for name in NEEDED) or record["status"] not in STATUSES:
            self.incomplete.append(place)
            return None
        if schema < SCHEMA:
            self.older[schema] += 1
        return self._shared(record)

    def _shared(self, record: Record) -> Record:
        """The same record, with strings and small tables that it shares with other records."""
        for name in SHARED:
            if isinstance(record.get(name), dict):
                record[name] = self.pool.setdefault((name, json.dumps(record[name])), record[name])
        keep = self.pool.setdefault
        return {keep(k, k): keep(v, v) if type(v) is str and k != "nodeid" else v for k, v in record.items()}

    def remarks(self) -> list[str]:
        lines = [f"{path}: holds no records: a run that ended before its first verdict?" for path in self.empty]
        if self.cut:
            lines.append(f"{number(len(self.cut), 'line')} cut off by a crash, left out: {_few(self.cut)}")
        for schema, n in sorted(self.older.items()):
            lines.append(f"{number(n, 'record')} of an older version (schema {schema}): read, without what is new")
        for name, n in sorted(self.unknown.items()):
            known = f"this version reads 1 to {SCHEMA}"
            lines.append(f"{number(n, 'record')} of an unknown version (schema {name}), left out: {known}")
        if self.incomplete:
            places = _few(self.incomplete)
            lines.append(f"{number(len(self.incomplete), 'record')} without {', '.join(NEEDED)}, left out: {places}")
        return lines


class _Merged:
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


def _parsed(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def _few(places: list[str]) -> str:
    return ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
