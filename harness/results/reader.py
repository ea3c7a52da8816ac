"""The one reader of results files: a line that is no valid record costs itself and is counted, whatever is in it.

The lines are bounded, the JSON is plain (no NaN, no name twice in a table), the fields are those of schema.py, and
every text is inert.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from harness.base.text import cut, inert, number
from harness.results.file import SCHEMA, Record, Records, ResultsError
from harness.results.schema import problem
from harness.results.verdict import Verdict

START = '{"schema":'  #: of every line that results/file.py writes
LONGEST = 32 * 2**20  #: bytes of a line
FEW = 3  #: places that a remark names
#: Fields whose values many records share: each value is kept once in memory.
SHARED = ("environment", "trace", "ceilings", "clocks")
#: A line of JSON without any of these has no text that `inert` would change.
SUSPECT = re.compile(
    r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]" r'|\\[ubfr]|##\[|(?:"|\\[nt]|\s)::'
)
#: The fields that a verdict of an older version may lack.
BLANK = Verdict("", "", "none", "passed").record() | {"environment": {}, "nodeid": "", "reproduce": ""}


class Reader:
    """Reads files line by line, and counts the lines that it cannot use."""

    def __init__(self) -> None:
        self.cut: list[str] = []  #: places of lines that end too early
        self.invalid: list[str] = []  #: places of other lines that are no record, with the reason
        self.empty: list[str] = []  #: files without a single record
        self.older: Counter[int] = Counter()
        self._pool: dict[Any, Any] = {}

    def records(self, path: Path) -> Iterator[Record]:
        """The valid records of a file, of every kind. ResultsError: it cannot be read, or is no results file."""
        began, valid = False, False
        try:
            with open_regular(path) as file:
                for at, line in _lines(file):
                    if line is not None and not line.strip(b"\0\t\r\n "):
                        continue
                    if not began and line is not None:
                        _require_start(path, at, line)
                    began = True
                    if record := self._record(line, f"{path}:{at}"):
                        valid = True
                        yield record
        except (OSError, ValueError) as error:
            raise ResultsError(f"{cut(str(path), 200)}: {getattr(error, 'strerror', None) or error}") from error
        if not valid:
            self.empty.append(str(path))

    def _record(self, line: bytes | None, place: str) -> Record | None:
        if line is None:
            self.invalid.append(f"{place}: a line of more than {LONGEST} bytes")
            return None
        text = line.decode(errors="replace")
        try:
            line.decode()
            record = _parsed(text)
        except (ValueError, RecursionError) as error:
            # In joined files, the remains of a cut line may precede a whole record on its line.
            text = text[text.rfind(START, 1) :] if START in text[1:] else ""
            record = _parsed_or_none(text)
            if record is not None or _is_cut(error, line):
                self.cut.append(place)
            else:
                self.invalid.append(f"{place}: {_reason(error)}")
            if record is None:
                return None
        wrong = problem(record) if isinstance(record, dict) else "no table"
        if wrong:
            self.invalid.append(f"{place}: {wrong}")
            return None
        return self._finished(record, bool(SUSPECT.search(text)))

    def _finished(self, record: Record, suspect: bool) -> Record:
        """The record with inert texts, with all fields of a verdict, and with values that it shares with others."""
        if suspect:
            record = _inert(record)
        if record["schema"] < SCHEMA:
            self.older[record["schema"]] += 1
            record["kind"] = "verdict"
        if record["kind"] != "verdict":
            return record
        for name in SHARED:
            if isinstance(record.get(name), dict):
                record[name] = self._pool.setdefault((name, json.dumps(record[name])), record[name])
        keep = self._pool.setdefault
        own = {keep(k, k): keep(v, v) if type(v) is str and k != "nodeid" else v for k, v in record.items()}
        return {**BLANK, **own}

    def remarks(self) -> list[str]:
        """Lines about what was left out and does not change the result, since the missing end or verdict does."""
        lines = []
        if self.cut:
            lines.append(f"{number(len(self.cut), 'line')} cut off by a crash, left out: {few(self.cut)}")
        for schema, n in sorted(self.older.items()):
            lines.append(f"{number(n, 'record')} of an older version (schema {schema}): read, without what is new")
        return lines

    def problems(self) -> list[str]:
        """Lines about files and records that are not what they should be."""
        lines = [f"{path}: holds no records: a run that ended before its first verdict?" for path in self.empty]
        if self.invalid:
            lines.append(f"{number(len(self.invalid), 'record')} not valid, left out: {few(self.invalid, '; ')}")
        return lines


@dataclass
class Contents:
    """The valid records of one results file, by kind, in the order of the file, and lines about the others."""

    begins: Records = field(default_factory=list)
    plans: Records = field(default_factory=list)
    records: Records = field(default_factory=list)  #: verdicts
    ends: Records = field(default_factory=list)
    outcomes: Records = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_results(path: Path) -> Contents:
    """Read one results file. ResultsError: it cannot be read, or is no results file."""
    reader, found = Reader(), Contents()
    kinds = {"begin": found.begins, "plan": found.plans, "verdict": found.records, "end": found.ends}
    kinds["outcome"] = found.outcomes
    for record in reader.records(path):
        kinds[record["kind"]].append(record)
    found.remarks, found.problems = reader.remarks(), reader.problems()
    return found


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading; a pipe, a device or a directory raises OSError, and never blocks."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(0, "not a regular file")
    return os.fdopen(file, "rb")


@lru_cache(maxsize=1 << 16)
def seconds(time: str) -> float:
    """Seconds since 1970 of a time of a results file; 0 if the text is not a time."""
    try:
        return datetime.strptime(time, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (ValueError, OverflowError):
        return 0.0


def few(places: list[str], between: str = ", ") -> str:
    """The first places, and how many more there are."""
    more = f" and {len(places) - FEW} more" if len(places) > FEW else ""
    return between.join(places[:FEW]) + more


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of every line; None for one that is too long."""
    at = 0
    while line := file.readline(LONGEST + 1):
        at += 1
        if at == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if len(line) <= LONGEST:
            yield at, line
            continue
        while not line.endswith(b"\n") and (line := file.readline(LONGEST)):
            pass
        yield at, None


def _require_start(path: Path, at: int, line: bytes) -> None:
    start = line.decode(errors="replace")[: len(START)]
    if not START.startswith(start.rstrip()):
        shown = repr(line[:40].decode(errors="replace").rstrip())
        raise ResultsError(f"{path}: no results file: line {at} begins {inert(shown)}, not {START!r}")


def _parsed(text: str) -> Any:
    """JSON, without NaN and infinities, and without a name that a table has twice. ValueError: it is not."""
    return json.loads(text, parse_constant=_refuse, object_pairs_hook=_table)


def _parsed_or_none(text: str) -> Any:
    try:
        return _parsed(text)
    except (ValueError, RecursionError):
        return None


def _is_cut(error: Exception, line: bytes) -> bool:
    """Whether a line of ours ends too early: JSON lacks nothing but its end."""
    if not line.startswith(START.encode()[: len(line.rstrip())]) or not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip()) - 6


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"a table has {cut(repr(max(names, key=names.__getitem__)), 40)} twice")
    return table


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "more levels of lists and tables than can be read"
    return cut(f"no JSON: {error}", 120)


def _inert(value: Any) -> Any:
    if isinstance(value, str):
        return inert(value)
    if isinstance(value, list):
        return [_inert(each) for each in value]
    return {inert(name): _inert(each) for name, each in value.items()} if isinstance(value, dict) else value
