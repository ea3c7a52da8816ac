"""The backends of these runs: `Faulty` misbehaves at the cases that the run's folder names, `Honest` never."""

from __future__ import annotations

import json
from typing import Any

from harness.problem.case import Case
from tests.reliability.catalogue import FAULTS
from tests.reliability.faults import MAP, STARTS, Fault, settle
from tests.support.emulated import Emulated

LEFT = settle()
ROWS: dict[str, str] = json.loads((LEFT / MAP).read_text())  #: {descriptor: name of the fault, or ""}
AT = {str(Case.parse(descriptor).problem): name for descriptor, name in ROWS.items()}


class Honest(Emulated):
    """Correct, always."""

    def __init__(self) -> None:
        super().__init__("honest")


class Counted(Honest):
    """Correct; it adds a line to the run's folder for every case that begins."""

    def prepare(self, problem: Any, layer: Any) -> Any:
        """The right call."""
        with (LEFT / STARTS).open("ab", buffering=0) as file:
            file.write(b"\n")
        return super().prepare(problem, layer)


class Faulty(Emulated):
    """Correct but for the faults of AT."""

    def __init__(self) -> None:
        super().__init__("faulty")

    @staticmethod
    def fault(problem: Any, where: str) -> Fault | None:
        """The fault of a method at a problem, if there is one."""
        fault = FAULTS.get(AT.get(str(problem), ""))
        return fault if fault and fault.where == where else None

    def supports(self, problem: Any) -> Any:
        """None, or what a fault makes of it."""
        if fault := self.fault(problem, "supports"):
            return fault.act()
        return None

    def plans(self, problem: Any) -> Any:
        """The right plans, or what a fault makes of them."""
        fault = self.fault(problem, "plans")
        answer = fault.act() if fault else None
        return answer if fault and fault.answers else super().plans(problem)

    def prepare(self, problem: Any, layer: Any) -> Any:
        """The right call, or what a fault makes of it."""
        fault = self.fault(problem, "prepare")
        answer = fault.act() if fault else None
        return answer if fault and fault.answers else super().prepare(problem, layer)

    def run(self, layer: Any, hidden_states: Any, topk_weights: Any, topk_ids: Any, out: Any = None) -> Any:
        """The right output, or what a fault makes of it."""
        fault = self.fault(layer.problem, "call")
        answer = fault.act() if fault else None
        return answer if fault and fault.answers else super().run(layer, hidden_states, topk_weights, topk_ids, out)
