"""The floor: the least number of verdicts that a whole run executes, by device and backend (cases/floor.toml)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from harness.base import toml
from harness.base.errors import bare, shown
from harness.results.file import Record, Records, ResultsError
from harness.results.verdict import NOT_EXECUTED

UPDATE = "if that is right, print a new floor with: python3 -m harness floor RESULTS"


def section(device: str) -> str:
    """A device's name in a floor file: "xpu-emulated" for "xpu (emulated)", which is not a bare TOML key."""
    return device.replace(" (emulated)", "-emulated")


def executed(records: Iterable[Record]) -> Counter[tuple[str, str]]:
    """{(section, backend): executed verdicts}; all but the unsupported ones were executed."""
    return Counter((section(r["device"]), r["backend"]) for r in records if r["status"] not in NOT_EXECUTED)


def read_floor(path: Path) -> dict[str, dict[str, int]]:
    """{section: {backend: least number}} of a floor file. ResultsError: it cannot be used."""
    floor = toml.read(path, ResultsError, f"--floor {bare(path)}")
    if not any(floor.values()):
        raise ResultsError(f"--floor {path}: demands nothing; valid: tables [DEVICE] of counts by backend")
    for device, numbers in floor.items():
        if not isinstance(numbers, dict):
            raise ResultsError(f"--floor {path}: {bare(device)}={shown(numbers)}: must be a table, [DEVICE]")
        for backend, number in numbers.items():
            if type(number) is not int or not 0 <= number < 10**9:
                where = f"[{bare(device)}] {bare(backend)}={shown(number)}"
                raise ResultsError(f"--floor {path}: {where}: must be a count, 0 or more")
    return floor


def shortfalls(
    floor: dict[str, dict[str, int]], records: Records, devices: Iterable[str], backends: Iterable[str] = ()
) -> list[str]:
    """One line for every backend below the floor, on these devices; of these backends, or of all."""
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
