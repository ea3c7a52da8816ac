"""Families of cases: from the rows of a module of cases/ to the Cases to run.

A module of cases/ has `FAMILY`, a name, and `ROWS`, a dict {descriptor: the reason for the row}. A descriptor without a
fill stands for two Cases, exact (where an exact fill exists) and random; with a scenario it stands for one, exact if
possible. `CPU_ROWS` and `GPU_ROWS` are rows for one kind of device. `STAGE`, if present, names the attribute of a
backend that the family tests: a stage, not the layer's output.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from types import ModuleType
from typing import Any

from harness.problem.case import FILLS, Case
from harness.problem.exactness import inexact

PACKAGE = "cases"
TIMED = "perf"  #: the family of timed cases, which runs only if -m names it


@dataclass(frozen=True)
class CaseRow:
    """One Case, its family and the reason for it."""

    case: Case
    family: str
    why: str


def sweep(template: str, why: str, **values: Iterable[Any]) -> dict[str, str]:
    """One row for every combination: sweep("t{t}-h256-...", "tails of M", t=(1, 15, 16, 17)).

    A value of "" drops its token: ("", "bias") sweeps a flag off and on.
    """
    names = list(values)
    rows = {}
    for chosen in product(*values.values()):
        text = template.format(**dict(zip(names, chosen)))
        rows["-".join(token for token in text.split("-") if token)] = why
    return rows


def expand(descriptor: str) -> list[Case]:
    """The Cases of a row's descriptor. DescriptorError: it is wrong."""
    case = Case.parse(descriptor)
    if set(descriptor.split("-")) & set(FILLS):
        return [case]
    exact, random = case.change(fill="exact"), case.change(fill="random")
    if inexact(case.problem):
        return [random]
    return [exact] if case.scenario != "once" else [exact, random]


def rows(module: ModuleType, on_cpu: bool) -> list[CaseRow]:
    """The Cases of a family's module, each once: for the CPU (and an emulated XPU), or for a GPU."""
    own = "CPU_ROWS" if on_cpu else "GPU_ROWS"
    table = {**getattr(module, "ROWS", {}), **getattr(module, own, {})}
    by_case = {
        case: CaseRow(case, module.FAMILY, why) for descriptor, why in table.items() for case in expand(descriptor)
    }
    return list(by_case.values())


def untimed() -> list[ModuleType]:
    """The families of every run: all but the family of timed cases."""
    return [m for m in families() if m.FAMILY != TIMED]


def families() -> list[ModuleType]:
    """Every family's module, in the order of their file names."""
    package = importlib.import_module(PACKAGE)
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("test_"))
    modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    return [m for m in modules if hasattr(m, "FAMILY")]
