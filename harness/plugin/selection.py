"""The devices of a run: those of this machine for which -m can be true and that --device admits.

They must be known before there are items: a process is prepared either for Triton's interpreter or for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

# A private module: pytest exports no parser of -m, and evaluates it on items only. A parser of our own could disagree
# with pytest's. tests/plugin/test_plugin.py fails if the two methods that are used here change.
from _pytest.mark.expression import Expression

from harness import device as devices
from harness.device import DEVICES, Device

EMULATED = (
    "xpu is EMULATED: its contract runs on the CPU, by Triton's interpreter, for backends that declare xpu_contract;",
    "nothing runs on an XPU: ",
)


@dataclass(frozen=True)
class Selection:
    """The devices to run on, and one line for each that is selected by name and absent."""

    devices: tuple[Device, ...]
    remarks: tuple[str, ...] = ()


def select_devices(markexpr: str, named: list[str], present: tuple[str, ...]) -> Selection:
    """The devices of this machine for which -m can be true and that --device admits; an absent XPU is emulated.

    markexpr: the value of -m; named: the values of --device; present: the names of this machine's devices.
    pytest.UsageError: markexpr is not an expression.
    """
    expression = MarkExpression(markexpr)
    chosen, remarks = [], []
    for name in DEVICES:
        if (named and name not in named) or not expression.can_be_true({d: d == name for d in DEVICES}):
            continue
        explicit = name in named or name in expression.names or (name == "xpu" and "emulated" in expression.names)
        if name in present:
            chosen.append(Device(name))
        elif explicit and name == "xpu":
            chosen.append(Device("xpu", emulated=True))
            remarks += [EMULATED[0], EMULATED[1] + devices.why_absent(name)]
        elif explicit:
            remarks.append(f"nothing runs on {name}: {devices.why_absent(name)}")
    return Selection(tuple(chosen), tuple(remarks))


class MarkExpression:
    """The expression of -m, with names whose value is not known yet."""

    def __init__(self, text: str) -> None:
        try:
            self._expression = Expression.compile(text) if text else None
        except Exception as error:  # a SyntaxError, or pytest 8's own class
            raise pytest.UsageError(f"-m {text!r}: {error}") from error
        self.names: set[str] = set()
        self._can_be_true({}, self.names)

    def can_be_true(self, known: dict[str, bool]) -> bool:
        """Whether it is true for some values of the names that are not known."""
        return self._can_be_true(known, set())

    def _can_be_true(self, known: dict[str, bool], seen: set[str]) -> bool:
        if self._expression is None:
            return True

        def value(name: str, /, **_: Any) -> bool:
            seen.add(name)
            if name not in known:
                raise _Unknown(name)
            return known[name]

        try:
            return self._expression.evaluate(value)
        except _Unknown as unknown:
            # Both values are tried, even if the first is enough: `seen` is then every name that matters.
            results = [self._can_be_true({**known, unknown.name: v}, seen) for v in (True, False)]
            return any(results)


class _Unknown(Exception):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name
