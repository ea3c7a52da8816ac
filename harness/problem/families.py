"""From the rows of a family of cases to the Cases to run.

A module in cases/ holds `FAMILY`, a name, and `ROWS`, a dict from a descriptor to the reason why that row exists. A
descriptor without a fill stands for two Cases, exact (where an exact fill exists) and random; one with a scenario for
one only, exact if it can be. `CPU_ROWS` and `GPU_ROWS` are rows for one kind of device alone. `STAGE`, if there is one,
names the only attribute of a backend that the family asks about: a stage, and not the layer's output.
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
TIMED = "perf"  #: the family whose cases are timed: run only where -m names it


@dataclass(frozen=True)
class CaseRow:
    """One Case, the family it belongs to and the reason it exists."""

    case: Case
    family: str
    why: str


def sweep(template: str, why: str, **values: Iterable[Any]) -> dict[str, str]:
    """One row for every combination: sweep("t{t}-h256-...", "tails of M", t=(1, 15, 16, 17)).

    A value of "" drops its token, so that a flag can be swept on and off.
    """
    names = list(values)
    rows = {}
    for chosen in product(*values.values()):
        text = template.format(**dict(zip(names, chosen)))
        rows["-".join(token for token in text.split("-") if token)] = why
    return rows


def expand(descriptor: str) -> list[Case]:
    """The Cases that a row's descriptor stands for."""
    case = Case.parse(descriptor)
    if set(descriptor.split("-")) & set(FILLS):
        return [case]
    exact, random = case.change(fill="exact"), case.change(fill="random")
    if inexact(case.problem):
        return [random]
    return [exact] if case.scenario != "once" else [exact, random]


def rows(module: ModuleType, on_cpu: bool) -> list[CaseRow]:
    """The Cases of a family's module, each once: on the CPU (an emulated XPU too), or on a GPU."""
    own = "CPU_ROWS" if on_cpu else "GPU_ROWS"
    table = {**getattr(module, "ROWS", {}), **getattr(module, own, {})}
    found = {
        case: CaseRow(case, module.FAMILY, why) for descriptor, why in table.items() for case in expand(descriptor)
    }
    return list(found.values())


def untimed() -> list[ModuleType]:
    """The families that every run asks: all but the one that is timed."""
    return [m for m in families() if m.FAMILY != TIMED]


def layer_questions() -> list[ModuleType]:
    """Those of them that judge the output of the layer."""
    return [m for m in untimed() if not hasattr(m, "STAGE")]


def families() -> list[ModuleType]:
    """Every family's module, in the order of their file names."""
    package = importlib.import_module(PACKAGE)
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("test_"))
    modules = [importlib.import_module(f"{PACKAGE}.{name}") for name in names]
    return [m for m in modules if hasattr(m, "FAMILY")]
