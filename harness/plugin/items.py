"""A parametrized test item of the plugin, its marks, and which backends have items on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.device import Device
from harness.plugin.selection import MarkExpression
from harness.problem import families
from harness.problem.case import Case


# -- the state of a run -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ItemParams:
    """One item: a case on a backend and a device."""

    case: Case
    family: str
    device: Device
    backend: Any
    spec: str  #: what --backend calls it


def marks_of(asked: ItemParams) -> list[str]:
    return [asked.device.name, asked.family, asked.case.fill, *(["emulated"] if asked.device.emulated else [])]


def may_run(backend: Any, device: Device) -> bool:
    """An emulated XPU is for kernels that promise its contract: others would only run on the CPU again."""
    return not device.emulated or getattr(backend, "xpu_contract", False)


def times(markexpr: str) -> bool:
    """Whether this run is one that times: -m names the family of timed cases, and not to leave it out."""
    expression = MarkExpression(markexpr)
    return families.TIMED in expression.names and expression.can_be_true({families.TIMED: True})
