"""What is said of a failed output besides where it is wrong: which mistake it looks like, and which stage makes it.

Asked only once a call has failed, and only of calls small enough; it changes no verdict.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from harness.diagnose import error_map, explain, match
from harness.diagnose.localise import localise
from harness.inputs.draw import Inputs
from harness.oracle.judge import Judgement
from reference.plan import RoundingPlan

REMEMBERED = 3  #: calls of a case, whose inputs and outputs a later call may have been given by mistake
MOST = 25  #: failures of one backend that a process diagnoses: where everything is red, the first few tell why
_diagnosed: Counter[str] = Counter()


def remember(past: match.Past, inputs: Inputs, judgement: Judgement) -> match.Past:
    """The last calls, this one included. What the backend was handed is let go: who frees weights may look whether
    they are gone."""
    if judgement.got is None or not match.affordable(inputs):
        return past
    return [*past[1 - REMEMBERED :], (replace(inputs, backend_layer=inputs.layer), judgement.got.cpu())]


def failure(
    backend: Any, plans: list[RoundingPlan], judgement: Judgement, inputs: Inputs, what: str = "",
    call: Callable[..., Tensor] | None = None, past: match.Past | None = None,
) -> Failed:  # fmt: skip
    """The failure of a judged call, explained. call: what returned the output, if it can be called again; past: calls
    before it, the last one last."""
    naming, stage, said = None, "", ""
    if match.affordable(inputs) and _diagnosed[backend.name] < MOST:
        _diagnosed[backend.name] += 1
        # An exact fill is judged without a plan: any that the backend may follow will do.
        fitting = [p for p in plans if str(p) == judgement.plan] or plans[:1]
        naming = match.match(judgement, inputs, fitting, past)
        if call is not None and judgement.got is not None:
            coarse = next((p for p in plans if p.accumulator.bits is not None), fitting[0])
            stage, said = localise(backend, call, inputs, coarse, judgement.got)
    summary, report = explain.explain(judgement, inputs, what, naming, said)
    return Failed(summary, report, error_map.of(judgement, inputs), naming.cause if naming else "", stage)


class Failed(Exception):
    """The case failed: one line, the whole report. For a judged output also where it is off (error_map.py) and, where
    they are known, the mistake that it looks like and the stage that makes it."""

    def __init__(
        self, summary: str, report: str, error_map: dict[str, Any] | None = None, cause: str = "", stage: str = ""
    ) -> None:
        super().__init__(summary)
        self.summary, self.report, self.error_map = summary, report, error_map or {}
        self.cause, self.stage = cause, stage
