"""The floor: the least number of verdicts that a whole run executes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.base import toml
from harness.results.file import Records, ResultsError
from harness.results.verdict import NOT_EXECUTED

UPDATE = "if that is right, print a new floor with: python3 -m harness floor RESULTS"


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
