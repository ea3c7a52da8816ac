"""Bugs in what a call does, not in what it returns: launches, allocations, waits, Python calls and tiles, counted by
perf/count/structure.py for the cases of cases/structure.toml, in the mutant and in the kernels as they are.

The recorded baseline is not asked: what the kernels as they are do is measured here and now, on any device.
"""

from __future__ import annotations

from typing import Any

from harness import backend as backends
from harness.base.processes import ROOT
from harness.device import Device
from harness.perf.count.differences import differences
from harness.perf.count.structure import NotCorrect, NotMeasured, measure
from harness.problem.case import Case

BASELINE = ROOT / "cases" / "structure.toml"
FAMILY = "structure"
Counts = dict[tuple[str, str], Any]  #: by case and backend


def cases(specs: tuple[str, ...], words: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """(descriptor, backend) of every counted case of these backends: those that have most of the words first, and then
    in the file's order."""
    from harness.perf.count.baseline_file import read

    found = [(block.descriptor, block.backend) for block in read(BASELINE).blocks if block.backend in specs]
    return sorted(found, key=lambda at: -len({*at[0].split("-"), at[1]} & set(words)))


def counted(descriptor: str, spec: str, device: Device) -> dict[str, Any] | None:
    """One call of one case, counted: Structure.record(); None where it cannot be."""
    try:
        return measure(Case.parse(descriptor), backends.load(spec), device).record()
    except NotMeasured:
        return None


def compared(descriptor: str, spec: str, device: Device, right: dict[str, Any] | None) -> tuple[str, str]:
    """(status, reason) of one case in a mutant against `right`, what the kernels as they are do."""
    if right is None:
        return "unsupported", "it cannot be counted in the kernels as they are"
    try:
        found = measure(Case.parse(descriptor), backends.load(spec), device).record()
    except NotMeasured as reason:
        return "structure", f"it can be counted no longer: {reason}"
    except NotCorrect as error:
        return error.verdict.status, error.verdict.reason
    except Exception as error:  # of the kernels, in a call that is judged right and is now counted
        return "crashed", f"{type(error).__name__}: {error}"
    told = differences(right, found)
    return ("structure", told[0]) if told else ("passed", "")
