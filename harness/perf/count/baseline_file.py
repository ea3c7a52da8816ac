"""The baseline's file: TOML, one table a case, one line a launch, an allocation, a module's functions, a target.

`render` and `parse` are each other's inverse for what is compared; perf/count/baseline.py says what that is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.base import toml
from harness.base.errors import UserError
from harness.perf.count.compiled import Compiled
from harness.perf.metrics import STRUCTURE

HEADER = """\
# What one call of each case does, counted, and what its kernels become when they are compiled.
#
#   python3 -m harness structure             compares; whatever differs is shown, and fails
#   python3 -m harness structure --accept    writes this file anew
#
# A new case: its table with a reason (`why`), and accept. `needs` names a package on whose version its numbers rest.
"""
_KEYS = {"why", "needs", "numbers", "launched", "allocated", "operators", "copies", "waits", "functions"}
_FUNCTIONS = ": "  # between a module and its functions


class BaselineError(UserError):
    """A baseline that cannot be read; the message names the file, the place and what would be valid."""


@dataclass
class Block:
    """One case on one backend. `record` is a part of Structure.record(), None if it was never accepted.

    launches: in the file "kernel[grid] configuration"; here in record["kernels"] and record["configurations"].
    """

    descriptor: str
    backend: str
    why: str
    needs: tuple[str, ...] = ()
    record: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        return f"{self.descriptor} @ {self.backend}"


@dataclass
class Baseline:
    """The file: versions of what the numbers rest on, the cases, and configurations -> target -> numbers."""

    versions: dict[str, str]
    blocks: list[Block] = field(default_factory=list)
    compiled: Compiled = field(default_factory=dict)


def read(path: Path) -> Baseline:
    """The baseline in a file; BaselineError if there is none, or it is not one."""
    return _baseline(toml.read(path, BaselineError), str(path))


def parse(text: str, name: str = "baseline") -> Baseline:
    """The baseline that a text holds; `name` is for the error's message."""
    return _baseline(toml.parse(text, BaselineError, name), name)


def _baseline(found: dict[str, Any], name: str) -> Baseline:
    versions, compiled = found.pop("versions", {}), found.pop("compiled", {})
    blocks = []
    for key, table in found.items():
        descriptor, at, backend = key.partition(" @ ")
        if not at or not isinstance(table, dict):
            raise BaselineError(f'{name}: {key!r}: must be a table, ["DESCRIPTOR @ BACKEND"]')
        if not isinstance(table.get("why"), str) or not table["why"]:
            raise BaselineError(f'{name}: ["{key}"] why={table.get("why")!r}: must be the reason for this case')
        for name_of in set(table) - _KEYS:
            raise BaselineError(f'{name}: ["{key}"] {name_of}: no such key; one of {", ".join(sorted(_KEYS))}')
        try:
            record = _record(table) if "numbers" in table else None
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BaselineError(f'{name}: ["{key}"]: {type(error).__name__} {error}; accept it anew') from error
        blocks.append(Block(descriptor, backend, table["why"], tuple(table.get("needs", ())), record))
    return Baseline(versions, blocks, {k: _numbers(v) for k, v in compiled.items()})


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
    return [what] * int(count) if times else [line]


def _counts(line: str) -> dict[str, int]:
    pairs = [word.rpartition(" ") for word in line.split(", ") if word]
    return {name: int(count) for name, _, count in pairs}


def render(baseline: Baseline) -> str:
    """The text of the file."""
    lines = [HEADER, "[versions]", *(f"{package} = {_toml(v)}" for package, v in baseline.versions.items())]
    for block in baseline.blocks:
        lines += ["", f"[{_toml(block.key)}]", f"why = {_toml(block.why)}"]
        lines += [f"needs = {_toml(list(block.needs))}"] if block.needs else []
        lines += _told(block.record) if block.record else []
    for kernel in sorted(baseline.compiled):
        lines += ["", f"[compiled.{_toml(kernel)}]"]
        for target, numbers in baseline.compiled[kernel].items():
            told = f"error: {numbers['error']}" if "error" in numbers else numbers
            lines.append(f"{_key(target)} = {_toml(told)}")
    return "\n".join(lines) + "\n"


def _told(record: Mapping[str, Any]) -> list[str]:
    functions: dict[str, dict[str, int]] = {}
    for name, count in record["functions"].items():
        module, _, function = name.rpartition(".")
        functions.setdefault(module, {})[function] = count
    launched = [f"{k} {c.partition(' ')[2]}" for k, c in zip(record["kernels"], record["configurations"])]
    allocated = Counter(record["allocations"])
    return [
        f"numbers = {_toml({name: record['metrics'][name] for name in STRUCTURE})}",
        f"launched = {_lines(launched)}",
        f"allocated = {_lines(f'{n} x {what}' if n > 1 else what for what, n in allocated.items())}",
        f"operators = {_toml(_named(record['operators']))}",
        f"copies = {_toml(_named(record['copies']))}",
        f"waits = {_toml(_named(record['waits']))}",
        f"functions = {_lines(f'{m}{_FUNCTIONS}{_named(counts)}' for m, counts in functions.items())}",
    ]


def _named(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _lines(values: Iterable[str]) -> str:
    found = [f"    {_toml(value)}," for value in values]
    return "\n".join(["[", *found, "]"]) if found else "[]"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)  # a string of JSON is one of TOML


def _key(name: str) -> str:
    return name if name.replace("_", "").replace("-", "").isalnum() and name.isascii() else _toml(name)
