"""The results file: JSON Lines, one record for each verdict, appended and flushed at once.

A run that dies leaves all records that it has written. A file is only ever appended to, so it may hold several runs:
each record carries the name of its run.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

from harness.base.errors import UserError

SCHEMA = 2  #: of new records
READABLE = (1, 2)  #: 1 lacks "perf"; early records of 2 lack "cause" and "stage"

Record = dict[str, Any]
Records = list[Record]


class ResultsError(UserError):
    """A results or floor file that cannot be used; the message names the file, the place and what is valid."""


class Results:
    """A results file, open for appending. ResultsError: it cannot be written."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path = path
        self.common = {"schema": SCHEMA, "run": f"{now()} {os.getpid()}", "commit": commit}
        self.common |= {k: v for k in ("row", "shard") if (v := os.environ.get(f"MOE_HARNESS_{k.upper()}"))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            if _lacks_newline(path):
                # The last run died in the middle of a line: our first record must not continue it.
                self._file.write("\n")
        except OSError as error:
            raise ResultsError(f"--results {path}: {error.strerror}") from error

    def append(self, record: Record) -> None:
        """Write a record, with the run's name, the commit, the time, and the row and shard of CI."""
        # One write of one whole line, flushed: whatever happens next, the file holds whole records.
        self._file.write(json.dumps({**self.common, "time": now(), **record}, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_results(path: Path) -> tuple[Records, list[str]]:
    """The records of a results file, and remarks about the lines that are left out: those cut off by a crash.

    ResultsError: the file cannot be read, or holds a record of another schema.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from error
    records, remarks = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            remarks.append(f"{path}:{number}: left out, the line is cut off after {len(line)} characters")
            continue
        if record.get("schema") not in READABLE:
            known = " and ".join(map(str, READABLE))
            raise ResultsError(f"{path}:{number}: schema={record.get('schema')}: this version reads {known}")
        records.append(record)
    return records, remarks


def git_commit(directory: Path) -> str:
    """The git commit of a checkout, with "+changes" if its files differ from it; "unknown" without git."""
    try:
        commit, changes = [
            subprocess.run(["git", *command], cwd=directory, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changes else "")


def now() -> str:
    """The time as records have it: 2026-11-30T21:33:18+0000."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _lacks_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
