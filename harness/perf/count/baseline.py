"""The structural baseline: the counts of one call of a few cases, in a file that can be read and diffed.

The file (baseline_file.py) is also the list of the cases. Counts depend on versions: operators on that of torch, Python
functions on that of Python too, machine code on that of Triton. Counts that depend on a version other than the one
installed here are not compared, and the report says so.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from harness import backend as backends
from harness.device import Device
from harness.perf.count.baseline_file import Baseline, BaselineError, Block, render
from harness.perf.count.compiled import compile_launches, configuration, kernel_name, read_configuration
from harness.perf.count.differences import differences
from harness.perf.count.structure import CallCounts, NotCorrect, NotMeasured, measure
from harness.perf.metrics import TARGETS
from harness.problem.case import Case

PACKAGES = ("python", "torch", "triton")
#: Parts of a record, and the packages on whose versions they depend. Launches depend on the kernels' code alone.
DEPENDS_ON = {
    "operators": ("torch",),
    "allocations": ("torch",),
    "copies": ("torch",),
    "waits": ("torch",),
    "functions": ("torch", "python"),
    "compiled": ("triton",),
}
#: Metrics that count these parts, by part.
METRICS_OF = {
    "operators": ("operators",),
    "allocations": ("allocations", "allocated_bytes"),
    "copies": ("copies_h2d", "copies_d2h"),
    "waits": ("syncs",),
    "functions": ("python_calls",),
}
RECORDED = ("metrics", "kernels", "operators", "copies", "waits", "allocations", "functions")


@dataclass
class BaselineCheck:
    """The result of a check against the baseline."""

    fresh: Baseline  #: the baseline as it would be accepted
    changes: dict[str, list[str]] = field(default_factory=dict)  #: sentences, by case or "compiled"
    not_compared: list[str] = field(default_factory=list)  #: with the reason
    compared: int = 0  #: cases
    kernels: int = 0  #: compiled kernel configurations that were compared


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions without build tags (2.13.0, not 2.13.0+cpu); "" for a package that is not installed."""
    import triton

    installed = {"python": ".".join(platform.python_version_tuple()[:2])}
    installed |= {"torch": torch.__version__, "triton": triton.__version__}
    for package in packages:
        if package not in installed:
            installed[package] = metadata.version(package) if find_spec(package) else ""
    return {package: installed[package].partition("+")[0] for package in packages}


def check(
    old: Baseline, device: Device, *, compiling: bool = True, accepting: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> BaselineCheck:  # fmt: skip
    """Measure every case of the baseline, and compare it.

    compiling: also compile the kernels. accepting: compile them even if there is nothing to compare them with.
    progress: called with a line about each step.
    """
    packages = (*PACKAGES, *dict.fromkeys(p for block in old.blocks for p in block.needs))
    here = versions(packages)
    result = BaselineCheck(Baseline(here))
    differing = {p for p in packages if old.versions.get(p, "") != here[p]}
    counts: dict[str, CallCounts] = {}
    reasons: dict[str, list[Block]] = {}
    for block in old.blocks:
        progress(block.key)
        if reason := _measure(block, device, result, counts):
            reasons.setdefault(reason, []).append(block)
        elif changed := sorted(differing & set(block.needs)):
            reasons.setdefault(_other_versions(changed, old, here), []).append(block)
        elif block.key in counts:
            _compare_block(block, counts[block.key], differing, result)
    result.not_compared += [f"{_cases(blocks)} ({reason})" for reason, blocks in reasons.items()]
    skipped = [part for part, needs in DEPENDS_ON.items() if differing & set(needs)]
    for part in skipped:
        changed = [p for p in DEPENDS_ON[part] if p in differing]
        result.not_compared.append(f"{part} ({_other_versions(changed, old, here)})")
    if compiling and (accepting or "compiled" not in skipped):
        _compile(old, counts, "compiled" not in skipped, result, progress)
    elif "compiled" not in skipped:
        result.not_compared.append("compiled (--no-compile)")
    return result


def _other_versions(packages: list[str], old: Baseline, here: dict[str, str]) -> str:
    return "; ".join(f"made with {p} {old.versions.get(p) or '?'}, here {here[p] or 'none'}" for p in packages)


def _cases(blocks: list[Block]) -> str:
    if len(blocks) == 1:
        return blocks[0].key
    return f"{len(blocks)} cases of {', '.join(dict.fromkeys(block.backend for block in blocks))}"


def _measure(block: Block, device: Device, result: BaselineCheck, counts: dict[str, CallCounts]) -> str:
    """Measure one case into `counts`. Returns the reason why it cannot be measured, or ""."""
    fresh = replace(block, record=None)
    result.fresh.blocks.append(fresh)
    try:
        measured = measure(Case.parse(block.descriptor), backends.load(block.backend), device)
    except NotMeasured as reason:
        return str(reason)
    except NotCorrect as error:
        result.changes[block.key] = [f"it is not answered correctly any more: {error}"]
    else:
        counts[block.key] = measured
        fresh.record = recorded(measured)
    return ""


def recorded(counts: CallCounts) -> dict[str, Any]:
    """The part of the counts that the file holds."""
    whole = counts.record()
    return {key: whole[key] for key in RECORDED} | {
        "configurations": [configuration(spec) for spec in counts.launches]
    }  # fmt: skip


def _compare_block(block: Block, counts: CallCounts, differing: set[str], result: BaselineCheck) -> None:
    if block.record is None:
        result.changes[block.key] = ["it is not in the baseline yet"]
        return
    result.compared += 1
    old, new = dict(block.record), recorded(counts)
    old["launches"] = _as_launches(old.pop("configurations"), counts.launches)
    new["launches"] = _as_launches(new.pop("configurations"), counts.launches)
    for part, needs in DEPENDS_ON.items():
        if differing & set(needs):
            for record in (old, new):
                record.pop(part, None)
                record["metrics"] = {k: v for k, v in record["metrics"].items() if k not in METRICS_OF.get(part, ())}
    if changes := differences(old, new):
        result.changes[block.key] = changes


def _as_launches(configurations: list[str], launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Launches from the lines of the file, which lack the names of parameters. The kernels of now supply them."""
    names = {kernel_name(spec): [k for k in spec["arguments"] if k not in spec["constants"]] for spec in launches}
    return [read_configuration(text, names.get(text.partition(" ")[0], [])) for text in configurations]


def _compile(
    old: Baseline,
    counts: dict[str, CallCounts],
    comparing: bool,
    result: BaselineCheck,
    progress: Callable[[str], None],
) -> None:
    launches = [spec for case in counts.values() for spec in case.launches]
    progress(f"compiling {len({configuration(spec) for spec in launches})} kernels for {', '.join(TARGETS)}")
    result.fresh.compiled = compile_launches(launches, TARGETS)
    if not comparing:
        return
    fresh = result.fresh.compiled
    result.kernels = sum(text in old.compiled for text in fresh)
    changes = differences({"compiled": old.compiled}, {"compiled": fresh})
    # The case that launches a configuration reports that it is new or gone, unless the file was edited by hand.
    missing = [text for text in fresh if text not in old.compiled]
    if missing and not result.changes:
        changes += [f"not in the baseline yet: {text}" for text in missing]
    if changes:
        result.changes["compiled"] = changes


def write(path: Path, baseline: Baseline) -> None:
    """Replace the file atomically: a reader sees the old or the new content. BaselineError: it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
        ) as file:
            file.write(render(baseline))
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise BaselineError(f"{path}: {error.strerror}") from error
