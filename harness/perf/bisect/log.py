"""The log of a search: every measurement at once, a JSON line each, so that a search that was interrupted goes on.

The first line says what is measured. The search is deterministic in what was measured: to go on is to ask again, and to
be answered from the log as far as it reaches.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from harness.base.errors import UserError

FORMAT = 1  #: of the lines; a log of another version is not continued


def default_path(common_directory: Path, what: dict[str, Any]) -> Path:
    """Where the log of this search lies: in the repository's git directory, under a name made of what is measured."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return common_directory / f"moe-harness-bisect-{digest}.jsonl"


class Log:
    """A log open for appending, alone: a context manager. `records` holds what it held already, and grows."""

    def __init__(self, path: Path, what: dict[str, Any], restart: bool = False) -> None:
        """Wrong if the file holds another search, or if somebody else is writing to it."""
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.cut = 0  #: lines that could not be read: a search was killed while it wrote them
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--log {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(f"--log {path}: another search writes to it now") from None
        try:
            if restart:
                self._file.truncate(0)
            self._continue(what)
        except BaseException:
            self._file.close()
            raise
        self.resumed = len(self.records)

    def _continue(self, what: dict[str, Any]) -> None:
        header = json.loads(json.dumps({"moe-harness-bisect": FORMAT, **what}))
        self._file.seek(0)
        text = self._file.read()
        lines = []
        for line in filter(None, text.split("\n")):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                self.cut += 1
        if lines and lines[0] != header:
            why = _difference(lines[0], header)
            raise UserError(f"--log {self.path}: {why}; another file, or --restart to write over it")
        if text and not text.endswith("\n"):
            self._file.write("\n")
        self.records = lines[1:]
        if not lines:
            self._write(header)

    def append(self, record: dict[str, Any]) -> None:
        """One whole line, on disk when this returns."""
        self._write(record)
        self.records.append(record)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def of(self, commit: str, kind: str) -> list[dict[str, Any]]:
        """The records of one kind about a commit, in order."""
        return [r for r in self.records if r["commit"] == commit and r["kind"] == kind]

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _difference(found: Any, header: dict[str, Any]) -> str:
    if not isinstance(found, dict) or found.get("moe-harness-bisect") != FORMAT:
        return "it is no log of this version of moe-harness bisect"
    names = [name for name in header if found.get(name) != header[name]]
    return "it holds another search: " + ", ".join(f"{n}={found.get(n)!r}, not {header[n]!r}" for n in names)
