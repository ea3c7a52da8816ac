"""The results file: JSON Lines, appended and flushed at once: the beginning of a run, its plan, its verdicts, its end.

A run that dies leaves all records that it has written; that it died is known, since its end is missing. A file is only
ever appended to, so it may hold several runs, one after another or at the same time: each record names its run. The
records are in memory as well, and the file is verified at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.base.errors import UserError
from harness.base.text import cut, number
from harness.results.bounds import bounded
from harness.results.verdict import REPORT

SCHEMA = 3  #: of new records
Record = dict[str, Any]
Records = list[Record]


class ResultsError(UserError):
    """A results or floor file that cannot be used; the message names the file, the place and what is valid."""


@dataclass(frozen=True)
class PlannedItem:
    """A case that a run is going to run."""

    nodeid: str
    family: str
    case: str
    backend: str
    device: str


class JsonLines:
    """A file of JSON Lines, open for appending. ResultsError: it cannot be written.

    A write that fails later (a full disk) does not stop the run: `finish` repeats it, and verifies the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process = os.getpid()
        self._lines: list[bytes] = []  #: all that were appended
        self._failed: list[bytes] = []  #: those whose write failed
        self._problem = ""  #: of the last failed write
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = _open(path, os.O_CREAT)
        except (OSError, ValueError) as error:
            raise ResultsError(f"--results {path}: {getattr(error, 'strerror', error)}") from error
        self._identity = _identity(self._file)
        # The last run died in the middle of a line: our first record must not continue it.
        self._cut = _lacks_newline(path)

    def write(self, record: Record) -> None:
        """Write a record as one line; never raises OSError."""
        if os.getpid() != self._process:
            return  # a backend has forked, and its child came back: it is no part of the run
        line = json.dumps(record, default=str, allow_nan=False).encode() + b"\n"
        self._lines.append(line)
        if not self._written(line):
            self._failed.append(line)

    def _written(self, line: bytes) -> bool:
        # One write of one whole line: whatever happens next, the file holds whole records.
        data = b"\n" * self._cut + line
        try:
            if _identity(self._file) != self._identity:
                self._problem = "its file descriptor was closed"  # and is another file's now
                return False
            count = os.write(self._file, data)
        except OSError as error:
            self._problem = str(error.strerror)
            return False
        self._cut = 0 < count < len(data) or (self._cut and not count)
        if count < len(data):
            self._problem = "the disk is full"
        return count == len(data)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0 and _identity(self._file) == self._identity:
            os.close(self._file)
        self._file = -1

    def finish(self) -> list[str]:
        """Close and verify the file. Returns a line if it lacks a record: all are in another file then, or lost.

        The file may have been deleted, replaced or truncated meanwhile, or the disk may have been full.
        """
        self.close()
        if os.getpid() != self._process:
            return []
        if self._failed:
            self._repeat()
        missing = self._missing()
        if not missing:
            return []
        why = f" ({self._problem})" if self._problem else ""
        lacks = f"--results {self.path}: {number(missing, 'record')} of {len(self._lines)} are not in it any more{why}"
        try:
            return [f"{lacks}; all records of this run are in {self._recover()}"]
        except OSError as error:
            return [f"{lacks}, and cannot be written elsewhere: {error.strerror}"]

    def _missing(self) -> int:
        """The number of our lines that the file does not have."""
        missing = set(self._lines)
        try:
            with self.path.open("rb") as file:
                for line in file:
                    missing.discard(line)
        except OSError:
            pass  # deleted: all of them are missing
        return len(missing)

    def _repeat(self) -> None:
        """Write the lines again that could not be written."""
        try:
            self._file = _open(self.path, 0)
        except OSError as error:
            self._problem = str(error.strerror)
            return
        self._identity, self._cut = _identity(self._file), _lacks_newline(self.path)
        for line in self._failed:
            self._written(line)
        self.close()

    def _recover(self) -> Path:
        """Write all lines to a new file beside ours, or in the folder for temporary files. Returns its path."""
        try:
            return _write_new(self.path.parent, self.path.stem, self._lines)
        except OSError:
            return _write_new(Path(tempfile.gettempdir()), self.path.stem, self._lines)


class Results(JsonLines):
    """The results file of one run. begin: the fields of its first record; run: the name of a run that goes on."""

    def __init__(self, path: Path, begin: Record, run: str = "") -> None:
        super().__init__(path)
        self.run = run or f"{now()} {os.getpid()}-{secrets.token_hex(3)}"
        self.common = {"run": self.run, "commit": begin.get("commit", "unknown")}
        self.common |= {k: cut(v) for k in ("row", "shard") if (v := os.environ.get(f"MOE_HARNESS_{k.upper()}"))}
        self._planned = 0
        self._counts: Counter[str] = Counter()
        self._record("begin", {**bounded(begin), **({"continues": True} if run else {})})
        if self._failed:
            self.close()
            raise ResultsError(f"--results {path}: {self._problem}")

    def _record(self, kind: str, record: Record) -> None:
        facts = {"schema": SCHEMA, "kind": kind, **self.common, "time": now()}
        self.write({**facts, **record, **facts})  # first, and not to be replaced

    def plan(self, items: Iterable[PlannedItem]) -> None:
        """Write what the run is going to run."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        nodes: dict[str, list[str]] = defaultdict(list)
        for item in items:
            counts[f"{item.backend}@{item.device}"][item.family] += 1
            node, parameters = split_nodeid(item.nodeid)
            nodes[node].append(parameters)
            self._planned += 1
        self._record("plan", {"total": self._planned, "counts": counts, "items": nodes})

    def append(self, record: Record) -> None:
        """Write a verdict's record, with the run's name, the commit, the time, and the row and shard of CI."""
        self._counts[record["status"]] += 1
        self._record("verdict", bounded(record, REPORT))

    def end(self, exit_code: int, seconds: float) -> list[str]:
        """Write the end of the run, with the exit status of pytest, and close the file.

        Returns lines for the user: records that are missing from the file, and where they are.
        """
        verdicts = {"planned": self._planned, "verdicts": self._counts.total(), "counts": self._counts}
        self._record("end", {"exit": exit_code, **verdicts, "seconds": round(seconds, 1)})
        return self.finish()


def split_nodeid(nodeid: str) -> tuple[str, str]:
    """A pytest id as (node, parameters): ("a.py::f", "x:y") of "a.py::f[x:y]", ("a.py::f", "") of "a.py::f"."""
    path, colons, rest = nodeid.partition("::")
    name, bracket, parameters = rest.partition("[")
    return (path + colons + name, parameters[:-1]) if bracket and rest.endswith("]") else (nodeid, "")


def git_commit(directory: Path) -> str:
    """The git commit of a checkout, with "+changes" if its files differ from it; "unknown" without git."""
    try:
        commit = _git(directory, "rev-parse", "HEAD").decode().strip()
        changed = _git(directory, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def git_changes(directory: Path) -> str:
    """A digest of what a checkout has beside its commit: changed files, and new Python files; "" if nothing."""
    try:
        changes = _git(directory, "diff", "HEAD", "--binary")
        new = _git(directory, "ls-files", "-z", "--others", "--exclude-standard", "--", "*.py").split(b"\0")
    except (OSError, subprocess.CalledProcessError):
        return ""
    for name in filter(None, new):
        path = directory / os.fsdecode(name)
        changes += name + b"\0" + (path.read_bytes() if path.is_file() else b"")
    return hashlib.sha256(changes).hexdigest()[:16] if changes else ""


def _git(directory: Path, *words: str) -> bytes:
    return subprocess.run(["git", *words], cwd=directory, capture_output=True, check=True).stdout


def now() -> str:
    """The time as records have it: 2026-11-30T21:33:18+0000."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _open(path: Path, flags: int) -> int:
    """Open a regular file for appending; a pipe or a device raises OSError, and never blocks."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC | flags, 0o666)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(0, "not a regular file")
    return file


def _write_new(folder: Path, stem: str, lines: list[bytes]) -> Path:
    """Write lines to a new file of a folder, such as r.recovered-1.jsonl. OSError: it cannot be written."""
    n = 1
    while (path := folder / f"{stem}.recovered-{n}.jsonl").exists():
        n += 1
    try:
        with path.open("xb") as file:
            file.writelines(lines)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def _identity(file: int) -> tuple[int, int] | None:
    """The device and inode of an open file; None if the descriptor is closed."""
    try:
        found = os.fstat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lacks_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
