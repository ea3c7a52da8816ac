"""Bugs in the work of a call rather than in its output: launches, allocations, waits, Python calls and tiles.

perf/count/structure.py counts them for the cases of cases/structure.toml, in the mutant and in the unmodified kernels.
The counts recorded in that file are not used: the unmodified kernels are counted here and now, on any device.
"""

from __future__ import annotations

from typing import Any

from harness import backend as backends
from harness.device import Device
from harness.perf.count.baseline_file import BASELINE, read
from harness.perf.count.differences import differences
from harness.perf.count.structure import NotCorrect, NotMeasured, measure
from harness.problem.case import Case

FAMILY = "structure"
Counts = dict[tuple[str, str], Any]  #: from (descriptor, backend) to CallCounts.record(), or None


def cases(specs: tuple[str, ...], words: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Return (descriptor, backend) of every counted case of these backends.

    Those that match most of the words come first; among equals the order is the file's.
    """
    pairs = [(block.descriptor, block.backend) for block in read(BASELINE).blocks if block.backend in specs]
    return sorted(pairs, key=lambda pair: -len({*pair[0].split("-"), pair[1]} & set(words)))


def count(descriptor: str, spec: str, device: Device) -> dict[str, Any] | None:
    """Return CallCounts.record() of one call of one case; None if the call cannot be counted."""
    try:
        return measure(Case.parse(descriptor), backends.load(spec), device).record()
    except NotMeasured:
        return None


def compare(descriptor: str, spec: str, device: Device, unmodified: dict[str, Any] | None) -> tuple[str, str, str]:
    """Return (status, reason, error_type) of one case in a mutant; `unmodified` is the unmodified kernels' record."""
    if unmodified is None:
        return "unsupported", "it cannot be counted in the unmodified kernels", ""
    try:
        record = measure(Case.parse(descriptor), backends.load(spec), device).record()
    except NotMeasured as reason:
        return "structure", f"it can no longer be counted: {reason}", ""
    except NotCorrect as error:
        return error.verdict.status, error.verdict.reason, error.verdict.error_type
    except Exception as error:  # raised by the kernels, in the call that is counted after a correct one
        return "crashed", f"{type(error).__name__}: {error}", type(error).__name__
    changes = differences(unmodified, record)
    return ("structure", changes[0], "") if changes else ("passed", "", "")
