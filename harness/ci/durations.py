"""Shards: a run split over several machines, balanced by the seconds that each item took before.

Items of one case on one device stay together: their process draws its inputs once. The heaviest go first, each to the
shard with the least load so far (longest processing time first: at most 4/3 of the optimum, Graham 1969, "Bounds on
multiprocessing timing anomalies"). Every shard computes the same split and keeps its own part.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapreplace
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.base import toml
from harness.base.arguments import LONGEST
from harness.base.errors import bare, shown
from harness.ci.matrix import MatrixError
from harness.results.file import Record
from harness.results.floor import section
from harness.results.merge import merge

SLOW = 1.0  #: seconds above the mean of its family and backend from which a case is recorded by itself
UNKNOWN = 1.0  #: seconds of an item without any record


# -- durations --------------------------------------------------------------------------------------------------------
@dataclass
class Durations:
    """Seconds of past verdicts. A section is a device's name in a floor file."""

    #: {section: {"case:backend": seconds}}
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    #: {section: {family: {backend: mean seconds of the items that `items` lacks}}}
    means: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def expected(self, device: str, family: str, backend: str, case: str) -> float:
        """The seconds that an item should take. With no record: the mean of its family and backend, or device."""
        name = section(device)
        known = self.items.get(name, {}).get(f"{case}:{backend}")
        if known is not None:
            return known
        families = self.means.get(name, {})
        if backend in families.get(family, {}):
            return families[family][backend]
        every = [seconds for backends in families.values() for seconds in backends.values()]
        return fmean(every) if every else UNKNOWN


def recorded(records: Iterable[Record]) -> Durations:
    """The durations of these verdicts, each item by itself; the mean of an item that ran several times."""
    seconds: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for r in records:
        seconds[section(r["device"]), r.get("family", ""), r["backend"], r["case"]].append(float(r["seconds"]))
    durations, means = Durations(), defaultdict(list)
    for (device, family, backend, case), each in seconds.items():
        durations.items.setdefault(device, {})[f"{case}:{backend}"] = fmean(each)
        means[device, family, backend].append(fmean(each))
    for (device, family, backend), each in means.items():
        durations.means.setdefault(device, {}).setdefault(family, {})[backend] = fmean(each)
    return durations


def condensed(records: Iterable[Record]) -> str:
    """A durations file that is small enough to commit: means by family and backend, and the slow cases."""
    records = list(records)
    whole = recorded(records)
    slow: dict[str, dict[str, float]] = {}
    for r in records:
        device, key = section(r["device"]), f"{r['case']}:{r['backend']}"
        seconds = whole.items[device][key]
        if seconds > whole.means[device][r.get("family", "")][r["backend"]] + SLOW:
            slow.setdefault(device, {})[key] = seconds
    rest = recorded(r for r in records if f"{r['case']}:{r['backend']}" not in slow.get(section(r["device"]), {}))
    lines = [
        "# Seconds of a verdict, oracle included, by which shards are balanced: means by device, family and backend,",
        f"# and cases that take {SLOW:g} s more than that. Only their proportions matter.",
        "# Printed by: python3 -m harness matrix --durations RESULTS",
    ]
    for device, families in sorted(rest.means.items()):
        for family, means in sorted(families.items()):
            lines += ["", f"[mean.{device}.{family}]"]
            lines += [f"{json.dumps(backend)} = {mean:.4f}" for backend, mean in sorted(means.items())]
    for device, items in sorted(slow.items()):
        lines += ["", f"[slow.{device}]", *(f"{json.dumps(key)} = {s:.1f}" for key, s in sorted(items.items()))]
    return "\n".join(lines) + "\n"


def read(path: Path) -> Durations:
    """Read a durations file, or a results file (JSON Lines). MatrixError, ResultsError: it cannot be used."""
    if path.suffix != ".toml":
        return recorded(merge([path]).records)
    where = f"--durations-from {path}"
    tables = toml.read(path, MatrixError, where)
    if strange := set(tables) - {"mean", "slow"}:
        raise MatrixError(f"{where}: [{bare(min(strange))}]: the tables are [mean...] and [slow...]")
    slow, means = tables.get("slow", {}), tables.get("mean", {})
    _check(where, "slow.DEVICE", slow, depth=2)
    _check(where, "mean.DEVICE.FAMILY", means, depth=3)
    if not any(slow.values()) and not any(any(families.values()) for families in means.values()):
        raise MatrixError(f"{where}: holds no durations; the tables are [mean...] and [slow...]")
    return Durations(slow, means)


def _check(where: str, name: str, value: Any, depth: int, key: str = "") -> None:
    """MatrixError unless the value is tables of tables of seconds, `depth` deep. name: of the innermost, for it."""
    if depth == 0:
        if type(value) not in (int, float) or not 0 <= value <= LONGEST:
            raise MatrixError(f"{where}: [{name}] {bare(key)}={shown(value)}: must be seconds, from 0 to {LONGEST}")
    elif not isinstance(value, dict):
        raise MatrixError(f"{where}: {bare(key or name)}={shown(value)}: must be a table, [{name}]")
    else:
        for inner, more in value.items():
            _check(where, name, more, depth - 1, inner)


# -- the split --------------------------------------------------------------------------------------------------------
def split(weights: dict[Any, float], count: int) -> dict[Any, int]:
    """The shard, from 1 to `count`, of every key. weights: {key: seconds}; their order does not matter."""
    loads, shards = [(0.0, shard) for shard in range(1, count + 1)], {}
    for key in sorted(weights, key=lambda key: (-weights[key], key)):
        load, shards[key] = loads[0]
        heapreplace(loads, (load + weights[key], shards[key]))
    return shards
