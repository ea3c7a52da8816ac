"""The structural baseline: what each of a few cases does, in a file that a person can read and a diff can show.

The file (baseline_text.py) is also the list of the cases. What is counted rests on versions: operators on torch's,
Python functions on Python's too, machine code on Triton's. What rests on another version than the one here is not
compared, and that is said.
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
from harness.perf.count.baseline_file import Baseline, Block, render
from harness.perf.count.compiled import compile_launches, configuration, kernel_name, read_configuration
from harness.perf.count.differences import differences
from harness.perf.count.structure import CallCounts, NotCorrect, NotMeasured, measure
from harness.perf.metrics import TARGETS
from harness.problem.case import Case

PACKAGES = ("python", "torch", "triton")
#: Parts of a record, and the packages on whose versions they rest. Launches rest on the kernels' own code alone.
RESTS_ON = {
    "operators": ("torch",),
    "allocations": ("torch",),
    "copies": ("torch",),
    "waits": ("torch",),
    "functions": ("torch", "python"),
    "compiled": ("triton",),
}
#: Metrics that are numbers of such parts, by part.
METRICS_OF = {
    "operators": ("operators",),
    "allocations": ("allocations", "allocated_bytes"),
    "copies": ("copies_h2d", "copies_d2h"),
    "waits": ("syncs",),
    "functions": ("python_calls",),
}
RECORDED = ("metrics", "kernels", "operators", "copies", "waits", "allocations", "functions")


@dataclass
class Comparison:
    """What came of a check. changes: by case, or "compiled", in sentences. compared: cases; kernels: configurations."""

    fresh: Baseline
    changes: dict[str, list[str]] = field(default_factory=dict)
    not_compared: list[str] = field(default_factory=list)
    compared: int = 0
    kernels: int = 0


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Those of this process, without what is said about a build (2.13.0+cpu); "" for a package that is not here."""
    import triton

    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    found |= {"torch": torch.__version__, "triton": triton.__version__}
    for package in packages:
        if package not in found:
            found[package] = metadata.version(package) if find_spec(package) else ""
    return {package: found[package].partition("+")[0] for package in packages}


def compare(
    old: Baseline, device: Device, *, compiling: bool = True, accepting: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Comparison:  # fmt: skip
    """Measure every case of the baseline and compare.

    compiling: kernels too. accepting: even if nothing can be compared with them. progress: is told what is being done.
    """
    packages = (*PACKAGES, *dict.fromkeys(p for block in old.blocks for p in block.needs))
    here = versions(packages)
    found = Comparison(Baseline(here))
    differing = {p for p in packages if old.versions.get(p, "") != here[p]}
    structures: dict[str, CallCounts] = {}
    reasons: dict[str, list[Block]] = {}
    for block in old.blocks:
        progress(block.key)
        if reason := _measure(block, device, found, structures):
            reasons.setdefault(reason, []).append(block)
        elif changed := sorted(differing & set(block.needs)):
            reasons.setdefault(_made_with(changed, old, here), []).append(block)
        elif block.key in structures:
            _compare_block(block, structures[block.key], differing, found)
    found.not_compared += [f"{_cases(blocks)} ({reason})" for reason, blocks in reasons.items()]
    skipped = [part for part, needs in RESTS_ON.items() if differing & set(needs)]
    for part in skipped:
        changed = [p for p in RESTS_ON[part] if p in differing]
        found.not_compared.append(f"{part} ({_made_with(changed, old, here)})")
    if compiling and (accepting or "compiled" not in skipped):
        _compile(old, structures, "compiled" not in skipped, found, progress)
    elif "compiled" not in skipped:
        found.not_compared.append("compiled (--no-compile)")
    return found


def _made_with(packages: list[str], old: Baseline, here: dict[str, str]) -> str:
    return "; ".join(f"made with {p} {old.versions.get(p) or '?'}, here {here[p] or 'none'}" for p in packages)


def _cases(blocks: list[Block]) -> str:
    if len(blocks) == 1:
        return blocks[0].key
    return f"{len(blocks)} cases of {', '.join(dict.fromkeys(block.backend for block in blocks))}"


def _measure(block: Block, device: Device, found: Comparison, structures: dict[str, CallCounts]) -> str:
    """Why it is not measured, or ""."""
    fresh = replace(block, record=None)
    found.fresh.blocks.append(fresh)
    try:
        structure = measure(Case.parse(block.descriptor), backends.load(block.backend), device)
    except NotMeasured as reason:
        return str(reason)
    except NotCorrect as error:
        found.changes[block.key] = [f"it is not answered correctly any more: {error}"]
    else:
        structures[block.key] = structure
        fresh.record = recorded(structure)
    return ""


def recorded(structure: CallCounts) -> dict[str, Any]:
    """What the file holds of a structure."""
    whole = structure.record()
    return {key: whole[key] for key in RECORDED} | {
        "configurations": [configuration(spec) for spec in structure.launches]
    }  # fmt: skip


def _compare_block(block: Block, structure: CallCounts, differing: set[str], found: Comparison) -> None:
    if block.record is None:
        found.changes[block.key] = ["it is not in the baseline yet"]
        return
    found.compared += 1
    old, new = dict(block.record), recorded(structure)
    old["launches"] = _as_launches(old.pop("configurations"), structure.launches)
    new["launches"] = _as_launches(new.pop("configurations"), structure.launches)
    for part, needs in RESTS_ON.items():
        if differing & set(needs):
            for record in (old, new):
                record.pop(part, None)
                record["metrics"] = {k: v for k, v in record["metrics"].items() if k not in METRICS_OF.get(part, ())}
    if told := differences(old, new):
        found.changes[block.key] = told


def _as_launches(configurations: list[str], launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines as launches; the parameters' names, which lines lack, are those of today's kernels."""
    names = {kernel_name(spec): [k for k in spec["arguments"] if k not in spec["constants"]] for spec in launches}
    return [read_configuration(text, names.get(text.partition(" ")[0], [])) for text in configurations]


def _compile(
    old: Baseline,
    structures: dict[str, CallCounts],
    comparing: bool,
    found: Comparison,
    progress: Callable[[str], None],
) -> None:
    launches = [spec for structure in structures.values() for spec in structure.launches]
    progress(f"compiling {len({configuration(spec) for spec in launches})} kernels for {', '.join(TARGETS)}")
    found.fresh.compiled = compile_launches(launches, TARGETS)
    if not comparing:
        return
    known = {text: found.fresh.compiled[text] for text in found.fresh.compiled if text in old.compiled}
    found.kernels = len(known)
    told = differences({"compiled": old.compiled}, {"compiled": found.fresh.compiled})
    # A configuration that is new, or gone, is told by the case that launches it; unless the file was edited by hand.
    missing = [text for text in found.fresh.compiled if text not in known]
    if missing and not found.changes:
        told += [f"not in the baseline yet: {text}" for text in missing]
    if told:
        found.changes["compiled"] = told


def write(path: Path, baseline: Baseline) -> None:
    """Replace the file at once: whoever reads it meanwhile sees the old one or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8") as file:
        file.write(render(baseline))
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
