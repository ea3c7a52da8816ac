"""A parametrized test item of the plugin, its marks, and which backends have items on a device."""

from __future__ import annotations

from dataclasses import dataclass

from harness.backend import Backend
from harness.device import Device
from harness.plugin.selection import MarkExpression
from harness.problem import families
from harness.problem.case import Case


@dataclass(frozen=True)
class ItemParams:
    """The parameters of one item: a case on a backend and a device."""

    case: Case
    family: str
    device: Device
    backend: Backend
    spec: str  #: the backend's name for --backend


def marks_of(params: ItemParams) -> list[str]:
    """The names of the item's marks: its device, family and fill, and "emulated" on an emulated device."""
    marks = [params.device.name, params.family, params.case.fill]
    return [*marks, "emulated"] if params.device.emulated else marks


def may_run(backend: Backend, device: Device) -> bool:
    """Whether the backend has items on the device.

    An emulated XPU is for kernels that promise its contract: others would only run on the CPU again.
    """
    return not device.emulated or backend.xpu_contract


def is_timing(markexpr: str) -> bool:
    """Whether -m selects the family of timed cases."""
    expression = MarkExpression(markexpr)
    return families.TIMED in expression.names and expression.can_be_true({families.TIMED: True})
