"""One run split over several machines: which shard an item is in, decided by the seconds that it took before.

Items of one case on one device stay together, since what is drawn for it is kept in a process. The heaviest go first,
each to the shard that is lightest so far (longest processing time first: at most 4/3 of the best possible, Graham 1969,
"Bounds on multiprocessing timing anomalies"). Every shard computes the same split and keeps its own part.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.base import toml
from harness.ci import matrix
from harness.results.floor import section
from harness.results.merge import merge

SLOW = 1.0  #: seconds above the mean of its family and backend from which a case is recorded by itself
UNKNOWN = 1.0  #: seconds of an item of which nothing is known


# -- durations --------------------------------------------------------------------------------------------------------
@dataclass
class Durations:
    """Seconds of past verdicts."""

    #: {section of the device: {"case:backend": seconds}}
    items: dict[str, dict[str, float]] = field(default_factory=dict)
    #: {section of the device: {family: {backend: mean seconds of the items that are not there}}}
    means: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)

    def of(self, device: str, family: str, backend: str, case: str) -> float:
        """What an item is expected to take; as the mean of its family and backend, else of its device, if unknown."""
        name = section(device)
        known = self.items.get(name, {}).get(f"{case}:{backend}")
        if known is not None:
            return known
        families = self.means.get(name, {})
        if backend in families.get(family, {}):
            return families[family][backend]
        every = [seconds for found in families.values() for seconds in found.values()]
        return fmean(every) if every else UNKNOWN


def recorded(records: Iterable[dict[str, Any]]) -> Durations:
    """The durations of these verdicts, each item by itself; an item that ran several times with its mean."""
    seconds: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for r in records:
        seconds[section(r["device"]), r.get("family", ""), r["backend"], r["case"]].append(float(r["seconds"]))
    found, means = Durations(), defaultdict(list)
    for (device, family, backend, case), each in seconds.items():
        found.items.setdefault(device, {})[f"{case}:{backend}"] = fmean(each)
        means[device, family, backend].append(fmean(each))
    for (device, family, backend), each in means.items():
        found.means.setdefault(device, {}).setdefault(family, {})[backend] = fmean(each)
    return found


def condensed(records: Iterable[dict[str, Any]]) -> str:
    """A durations file, small enough to be committed: means by family and backend, and the slow cases."""
    records = list(records)
    whole = recorded(records)
    few = Durations(means=whole.means)
    for r in records:
        device, key = section(r["device"]), f"{r['case']}:{r['backend']}"
        seconds = whole.items[device][key]
        if seconds > whole.means[device][r.get("family", "")][r["backend"]] + SLOW:
            few.items.setdefault(device, {})[key] = seconds
    rest = recorded(r for r in records if f"{r['case']}:{r['backend']}" not in few.items.get(section(r["device"]), {}))
    lines = [
        "# Seconds of a verdict, oracle included, by which shards are balanced: means by device, family and backend,",
        f"# and cases that take {SLOW:g} s more than that. Only their proportions matter.",
        "# Printed by: python3 -m harness matrix --durations RESULTS",
    ]
    for device, families in sorted(rest.means.items()):
        for family, means in sorted(families.items()):
            lines += ["", f"[mean.{device}.{family}]"]
            lines += [f"{json.dumps(backend)} = {mean:.4f}" for backend, mean in sorted(means.items())]
    for device, items in sorted(few.items.items()):
        lines += ["", f"[slow.{device}]", *(f"{json.dumps(key)} = {s:.1f}" for key, s in sorted(items.items()))]
    return "\n".join(lines) + "\n"


def read(path: Path) -> Durations:
    """A durations file, or a results file (JSON Lines). MatrixError, ResultsError: it cannot be used."""
    if path.suffix != ".toml":
        return recorded(merge([path])[0])
    found = toml.read(path, matrix.MatrixError, f"--durations-from {path}")
    if set(found) - {"mean", "slow"}:
        raise matrix.MatrixError(f"--durations-from {path}: [{min(found)}]: the tables are [mean...] and [slow...]")
    return Durations(found.get("slow", {}), found.get("mean", {}))


# -- the split --------------------------------------------------------------------------------------------------------
def split(weights: dict[Any, float], count: int) -> dict[Any, int]:
    """The shard, from 1 to `count`, of every key. It depends on the keys and their weights, not on their order."""
    loads, found = [0.0] * count, {}
    for key in sorted(weights, key=lambda key: (-weights[key], key)):
        lightest = loads.index(min(loads))
        loads[lightest] += weights[key]
        found[key] = lightest + 1
    return found
