"""The file of the baseline: TOML, a table for each case, a line for each launch, allocation, module and target.

`parse` is the inverse of `render` for all that perf/count/baseline.py compares.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.base import toml
from harness.base.errors import UserError, bare, shown
from harness.base.processes import ROOT
from harness.perf.count.compiled import Compiled
from harness.perf.metrics import STRUCTURE

BASELINE = ROOT / "cases" / "structure.toml"  #: of this repository
HEADER = """\
# What one call of each case does, counted, and what its kernels become when they are compiled.
#
#   python3 -m harness structure             compares; whatever differs is shown, and fails
#   python3 -m harness structure --accept    writes this file anew
#
# A new case: its table with a reason (`why`), and accept. `needs` names a package on whose version its numbers rest.
"""
MOST = 1_000_000  #: equal allocations of a call
_KEYS = {"why", "needs", "numbers", "launched", "allocated", "operators", "copies", "waits", "functions"}
_FUNCTIONS = ": "  # between a module and the names of its functions


class BaselineError(UserError):
    """A baseline that cannot be read. The message names the file and the place, and says what is valid."""


@dataclass
class Block:
    """One case on one backend.

    why: the reason for the case. needs: packages on whose versions its numbers depend. record: a part of
    CallCounts.record(), or None if the case was never accepted; a launch is "kernel[grid] configuration" in the file,
    and is split into record["kernels"] and record["configurations"].
    """

    descriptor: str
    backend: str
    why: str
    needs: tuple[str, ...] = ()
    record: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """The name of its table in the file."""
        return f"{self.descriptor} @ {self.backend}"


@dataclass
class Baseline:
    """The content of the file: versions of the packages, cases, and numbers by kernel configuration and target."""

    versions: dict[str, str]
    blocks: list[Block] = field(default_factory=list)
    compiled: Compiled = field(default_factory=dict)


def read(path: Path) -> Baseline:
    """Read a baseline. Raises BaselineError if the file is missing, or holds something else."""
    return _baseline(toml.read(path, BaselineError), str(path))


def parse(text: str, name: str = "baseline") -> Baseline:
    """Parse the text of a baseline. BaselineError calls it by `name`."""
    return _baseline(toml.parse(text, BaselineError, name), name)


def _baseline(content: dict[str, Any], name: str) -> Baseline:
    versions, compiled = content.pop("versions", {}), content.pop("compiled", {})
    if not content:
        raise BaselineError(f'{name}: holds no cases; a case is a table, ["DESCRIPTOR @ BACKEND"]')
    if not isinstance(versions, dict) or not all(isinstance(version, str) for version in versions.values()):
        raise BaselineError(f"{name}: versions={shown(versions)}: must be a table of strings, [versions]")
    blocks = []
    for key, table in content.items():
        descriptor, at, backend = key.partition(" @ ")
        if not at or not isinstance(table, dict):
            raise BaselineError(f'{name}: {shown(key)}: must be a table, ["DESCRIPTOR @ BACKEND"]')
        if not isinstance(table.get("why"), str) or not table["why"]:
            raise BaselineError(f'{name}: ["{key}"] why={shown(table.get("why"))}: must be the reason for this case')
        for unknown in set(table) - _KEYS:
            raise BaselineError(f'{name}: ["{key}"] {bare(unknown)}: no such key; one of {", ".join(sorted(_KEYS))}')
        try:
            record = _record(table) if "numbers" in table else None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BaselineError(f'{name}: ["{key}"]: {type(error).__name__} {error}; accept it anew') from error
        needs = table.get("needs", [])
        if not isinstance(needs, list) or not all(isinstance(package, str) for package in needs):
            raise BaselineError(f'{name}: ["{key}"] needs={shown(needs)}: must be a list of packages')
        blocks.append(Block(descriptor, backend, table["why"], tuple(needs), record))
    return Baseline(versions, blocks, _compiled(compiled, name))


def _compiled(tables: Any, name: str) -> Compiled:
    try:
        return {kernel: _numbers(targets) for kernel, targets in tables.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise BaselineError(f"{name}: compiled={shown(tables)}: must be tables of numbers by target") from error


def _record(table: Mapping[str, Any]) -> dict[str, Any]:
    launches = [line.partition(" ") for line in table["launched"]]
    numbers = table["numbers"]
    return {
        "metrics": {metric: int(numbers[metric]) for metric in STRUCTURE},
        "kernels": [kernel for kernel, _, _ in launches],
        "configurations": [f"{kernel.partition('[')[0]} {rest}" for kernel, _, rest in launches],
        "operators": _counts(table["operators"]),
        "copies": _counts(table["copies"]),
        "waits": _counts(table["waits"]),
        "allocations": [what for line in table["allocated"] for what in _repeated(line)],
        "functions": {
            f"{module}.{function}": n
            for line in table["functions"]
            for module, _, rest in (line.partition(_FUNCTIONS),)
            for function, n in _counts(rest).items()
        },
    }


def _numbers(targets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {t: {"error": n.removeprefix("error: ")} if isinstance(n, str) else dict(n) for t, n in targets.items()}


def _repeated(line: str) -> list[str]:
    count, times, what = line.partition(" x ")
    if times and not 1 <= int(count) <= MOST:
        raise ValueError(f"{count} x: must be from 1 to {MOST}")
    return [what] * int(count) if times else [line]


def _counts(line: str) -> dict[str, int]:
    pairs = [word.rpartition(" ") for word in line.split(", ") if word]
    return {name: int(count) for name, _, count in pairs}


def render(baseline: Baseline) -> str:
    """The text of the file, which ends with a newline."""
    lines = [HEADER, "[versions]", *(f"{package} = {_toml(v)}" for package, v in baseline.versions.items())]
    for block in baseline.blocks:
        lines += ["", f"[{_toml(block.key)}]", f"why = {_toml(block.why)}"]
        lines += [f"needs = {_toml(list(block.needs))}"] if block.needs else []
        lines += _record_lines(block.record) if block.record else []
    for kernel in sorted(baseline.compiled):
        lines += ["", f"[compiled.{_toml(kernel)}]"]
        for target, numbers in baseline.compiled[kernel].items():
            value = f"error: {numbers['error']}" if "error" in numbers else numbers
            lines.append(f"{_key(target)} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _record_lines(record: Mapping[str, Any]) -> list[str]:
    functions: dict[str, dict[str, int]] = {}
    for name, count in record["functions"].items():
        module, _, function = name.rpartition(".")
        functions.setdefault(module, {})[function] = count
    launched = [f"{k} {c.partition(' ')[2]}" for k, c in zip(record["kernels"], record["configurations"])]
    allocated = Counter(record["allocations"])
    return [
        f"numbers = {_toml({name: record['metrics'][name] for name in STRUCTURE})}",
        f"launched = {_array(launched)}",
        f"allocated = {_array(f'{n} x {what}' if n > 1 else what for what, n in allocated.items())}",
        f"operators = {_toml(_counts_text(record['operators']))}",
        f"copies = {_toml(_counts_text(record['copies']))}",
        f"waits = {_toml(_counts_text(record['waits']))}",
        f"functions = {_array(f'{m}{_FUNCTIONS}{_counts_text(counts)}' for m, counts in functions.items())}",
    ]


def _counts_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _array(values: Iterable[str]) -> str:
    lines = [f"    {_toml(value)}," for value in values]
    return "\n".join(["[", *lines, "]"]) if lines else "[]"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # a string of JSON is one of TOML


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _toml(name)
