"""Explains a failed output beyond its places: the fault that it resembles, and the stage that makes it.

Runs only after a call has failed, on problems that are small enough; it changes no verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from harness.diagnose.explain import explain
from harness.diagnose.faults.leftovers import MOST_CALLS, Past
from harness.diagnose.localise import localise
from harness.diagnose.match import affordable, match
from harness.diagnose.report import Report
from harness.inputs.draw import Inputs
from harness.oracle.judge import Judgement
from reference.plan import RoundingPlan


class Failed(Exception):
    """The case failed; carries the Report. The message is its summary."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.summary)
        self.report = report


class Diagnoses:
    """The number of failures of each backend that this process has diagnosed, and the limit of that number."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._counts: Counter[str] = Counter()

    def allow(self, backend: str) -> bool:
        """Whether one more failure of the backend is diagnosed; counts it if so."""
        if self._counts[backend] >= self.limit:
            return False
        self._counts[backend] += 1
        return True


#: A backend that fails everywhere fails for few reasons: its first failures in a process are enough.
DIAGNOSES = Diagnoses(limit=25)


def remember(past: Past, inputs: Inputs, judgement: Judgement) -> Past:
    """The last calls, this one included. Drops the backend's tensors, so that swap.dropped can see them freed."""
    if judgement.got is None or not affordable(inputs):
        return past
    return [*past[1 - MOST_CALLS :], (replace(inputs, backend_layer=inputs.layer), judgement.got.cpu())]


def failure(
    backend: Any, plans: list[RoundingPlan], judgement: Judgement, inputs: Inputs, what: str = "",
    call: Callable[..., Tensor] | None = None, past: Past | None = None,
) -> Failed:  # fmt: skip
    """The failure of a judged call, with its Report.

    call: the callable that returned the output, if it can be called again; past: the calls before this one.
    """
    if not affordable(inputs) or not DIAGNOSES.allow(backend.name):
        return Failed(explain(judgement, inputs, what))
    # An exact fill is judged without a plan: any plan that the backend may follow will do.
    fitting = [p for p in plans if str(p) == judgement.plan] or plans[:1]
    matched, stage, replay = match(judgement, inputs, fitting, past), "", ""
    if call is not None and judgement.got is not None:
        coarse = next((p for p in plans if p.accumulator.bits is not None), fitting[0])
        stage, replay = localise(backend, call, inputs, coarse, judgement.got)
    return Failed(explain(judgement, inputs, what, matched, stage, replay))
