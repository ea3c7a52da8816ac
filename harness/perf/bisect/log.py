"""The log of a search: one JSON line for each measurement, written at once, so that an interrupted search can go on.

The first line says what is measured. The search depends on the measurements alone. A resumed search therefore makes the
same requests again, and the log answers those that it holds.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from harness.base.errors import UserError, shown

FORMAT = 2  #: version of the lines; a log of another version is not continued


def default_path(common_directory: Path, what: dict[str, Any]) -> Path:
    """The log's path: in the repository's git directory, with a name made from a digest of what is measured."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return common_directory / f"moe-harness-bisect-{digest}.jsonl"


class Log:
    """A log, locked and open for appending; a context manager. `records` holds its lines, old and new."""

    def __init__(self, path: Path, what: dict[str, Any], restart: bool = False) -> None:
        """Raises UserError if the file holds another search, or if another process is writing to it."""
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.cut = 0  #: lines that cannot be read: a search was killed while it wrote them
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise UserError(f"--log {path}: must be a regular file")
            self._file = path.open("a+", encoding="utf-8", errors="replace")
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
                lines.append(_checked(json.loads(line)))
            except (ValueError, RecursionError):
                self.cut += 1
        foreign = "\n" in text and "moe-harness-bisect" not in (lines or [{}])[0]  # more than a header that was cut
        if foreign or (lines and lines[0] != header):
            why = _difference((lines or [{}])[0], header)
            raise UserError(f"--log {self.path}: {why}; another file, or --restart to write over it")
        if text and not text.endswith("\n"):
            self._file.write("\n")
        self.records = lines[1:]
        if not lines:
            self._write(header)

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. It is on disk when this returns."""
        self._write(record)
        self.records.append(record)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def of_commit(self, commit: str, kind: str) -> list[dict[str, Any]]:
        """The records of one kind about a commit, in the order of the log."""
        return [r for r in self.records if r["commit"] == commit and r["kind"] == kind]

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _checked(line: Any) -> dict[str, Any]:
    """A line that is a header or a measurement; ValueError for any other."""
    if not isinstance(line, dict) or not ("moe-harness-bisect" in line or {"commit", "kind"} <= set(line)):
        raise ValueError("neither a header nor a measurement")
    return line


def _difference(first: Any, header: dict[str, Any]) -> str:
    if first.get("moe-harness-bisect") != FORMAT:
        return "it is no log of this version of moe-harness bisect"
    names = [name for name in header if first.get(name) != header[name]]
    return "it holds another search: " + ", ".join(f"{n}={shown(first.get(n))}, not {shown(header[n])}" for n in names)
