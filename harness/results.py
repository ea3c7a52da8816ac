"""The results file: JSON Lines, one record a verdict, appended and flushed at once; and the floor made from it.

A run that dies leaves every record that it had written. Files are only ever appended to, so one file may hold several
runs: each record carries its run's name.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import toml

SCHEMA = 2  #: of a record, as it is written now
READABLE = (1, 2)  #: 1: without "perf"; the first of 2 without "cause" and "stage"
NOT_EXECUTED = ("unsupported",)
UPDATE = "if that is right, print a new floor with: python3 -m harness floor RESULTS"

Records = list[dict[str, Any]]


class ResultsError(Exception):
    """A results or floor file that cannot be used; the message names the file, the place and what is valid."""


class Results:
    """A results file that is open for appending."""

    def __init__(self, path: Path, commit: str) -> None:
        self.path = path
        self.common = {"schema": SCHEMA, "run": f"{now()} {os.getpid()}", "commit": commit}
        self.common |= {k: v for k in ("row", "shard") if (v := os.environ.get(f"MOE_HARNESS_{k.upper()}"))}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            if _lacks_newline(path):
                # The last run was cut off in the middle of a line: its remains must not spoil our first record.
                self._file.write("\n")
        except OSError as error:
            raise ResultsError(f"--results {path}: {error.strerror}") from error

    def append(self, record: dict[str, Any]) -> None:
        # One write of one whole line, flushed: whatever happens next, the file holds whole records.
        self._file.write(json.dumps({**self.common, "time": now(), **record}, default=str) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> tuple[Records, list[str]]:
    """The records of a results file, and remarks about lines that had to be left out: those that a crash cut."""
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


def commit(directory: Path) -> str:
    """The git commit of a checkout, with "+changes" if its files differ from it; "unknown" without git."""
    try:
        found = [
            subprocess.run(["git", *command], cwd=directory, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + ("+changes" if found[1] else "")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _lacks_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


# -- the floor: the least number of verdicts that a whole run executes ------------------------------------------------
def section(device: str) -> str:
    """A device's name in a floor file: "xpu (emulated)" is no bare TOML key."""
    return device.replace(" (emulated)", "-emulated")


def executed(records: Iterable[dict[str, Any]]) -> Counter[tuple[str, str]]:
    """How many verdicts each (section, backend) executed: anything but unsupported."""
    return Counter((section(r["device"]), r["backend"]) for r in records if r["status"] not in NOT_EXECUTED)


def read_floor(path: Path) -> dict[str, dict[str, int]]:
    """{section: {backend: least number}} of a floor file."""
    found = toml.read(path, ResultsError, f"--floor {path}")
    for device, numbers in found.items():
        if not isinstance(numbers, dict):
            raise ResultsError(f"--floor {path}: {device}={numbers!r}: must be a table, [{device}]")
        for backend, number in numbers.items():
            if type(number) is not int or number < 0:
                raise ResultsError(f"--floor {path}: [{device}] {backend}={number!r}: must be a count, 0 or more")
    return found


def shortfalls(
    floor: dict[str, dict[str, int]], records: Records, devices: Iterable[str], backends: Iterable[str] = ()
) -> list[str]:
    """One line for every backend that executed less than the floor, on the devices (and backends) of this run."""
    ran, only = executed(records), set(backends)
    return [
        f"floor: {backend} on {device} executed {ran[device, backend]} verdicts, at least {number} are due; {UPDATE}"
        for device in map(section, devices)
        for backend, number in floor.get(device, {}).items()
        if ran[device, backend] < number and (not only or backend in only)
    ]


def new_floor(records: Records) -> str:
    """A floor file for the last run on each device: 90 % of what it executed, rounded down."""
    last = {r["device"]: r["run"] for r in records}
    counts = executed(r for r in records if r["run"] == last[r["device"]])
    lines = [
        "# The least number of verdicts that a whole run executes, by device and backend: 90 % of a run that was good.",
        "# Printed by: python3 -m harness floor RESULTS",
    ]
    for device in sorted({device for device, _ in counts}):
        lines += ["", f"[{device}]"]
        lines += [f"{_key(b)} = {n * 9 // 10}" for (d, b), n in sorted(counts.items()) if d == device]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    bare = name.replace("-", "").replace("_", "")
    return name if bare.isascii() and bare.isalnum() else json.dumps(name)
