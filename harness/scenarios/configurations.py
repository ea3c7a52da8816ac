"""Scenarios of what a backend may choose from: every tile configuration, and the same bits whatever the batch.

For backends with configurations(problem), names and keyword options for prepare(); and for those that declare
batch_invariant: True, or "configured" if it takes one fixed configuration to be so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.backend import Unsupported
from harness.inputs.draw import Inputs
from harness.problem.case import Problem
from harness.scenarios.metamorphic import tokens_of
from harness.scenarios.registry import scenario
from harness.session.session import Session

INVARIANT = (True, False, "configured")  #: what batch_invariant may be


def configurations(s: Session, problem: Problem) -> dict[str, dict]:
    """The backend's, by name; Unsupported if it has none."""
    if not hasattr(s.backend, "configurations"):
        raise Unsupported(f"scenario: {s.backend.name} has no configurations")
    found = s.backend.configurations(problem)
    s.require(bool(found), "configurations() is empty; leave it out if there is nothing to choose from")
    return found


@scenario("config.all")
def every_configuration(s: Session) -> None:
    """Not only the configuration that this batch gets: each that any batch could get serves it."""
    inputs = s.draw()
    choice = configurations(s, inputs.case.problem)
    for name, options in choice.items():
        s.check(s.prepare(inputs.case.problem, inputs.backend_layer, **options), inputs, f"configuration {name}")
    launched = [trace.launched for trace in s.traces]
    ignored = len(choice) > 1 and any(launched) and all(some == launched[0] for some in launched)
    s.require(not ignored, f"{len(choice)} configurations launched the same kernels: the choice is ignored")


@scenario("relation.batch_invariant")
def batch_invariant(s: Session) -> None:
    """A token's row has the same bits alone, among a few, and in a batch three times as large."""
    declared, problem = getattr(s.backend, "batch_invariant", False), s.case.problem
    s.require(declared in INVARIANT, f"batch_invariant={declared!r}; valid: {', '.join(map(repr, INVARIANT))}")
    if declared is False:
        raise Unsupported(f"scenario: {s.backend.name} does not declare batch_invariant")
    if problem.quant is not None and problem.quant.activation == "tensor":
        raise Unsupported("quant: a dynamic per-tensor scale belongs to the whole batch")
    inputs = s.draw()
    if declared is True:
        _ask_in_batches(s, inputs, s.prepare(problem, inputs.backend_layer), "")
        return
    choice = configurations(s, problem)
    for name in dict.fromkeys((next(iter(choice)), list(choice)[-1])):  # the table's two ends: each costs five calls
        _ask_in_batches(s, inputs, s.prepare(problem, inputs.backend_layer, **choice[name]), f", configuration {name}")


def _ask_in_batches(s: Session, inputs: Inputs, call: Callable, how: str) -> None:
    tokens = inputs.case.problem.tokens
    everybody = torch.arange(tokens, device=inputs.hidden_states.device)
    whole = s.check(call, inputs, f"the whole batch{how}").clone()
    batches = {
        "the first token alone": everybody[:1],
        "the last token alone": everybody[-1:],
        "three of the middle": everybody[tokens // 2 :][:3],
        "three times the batch": everybody.repeat(3),
    }
    for name, rows in batches.items():
        got, _ = s.call(call, tokens_of(inputs, name, rows), name + how)
        wrong = torch.nonzero((_bits(got) != _bits(whole[rows])).any(1)).flatten().tolist()
        s.require(
            not wrong,
            f"{name}{how}: other bits than in the whole batch in {len(wrong)} of {len(rows)} rows: {wrong[:6]}",
        )


def _bits(rows: Tensor) -> Tensor:
    """[T, bytes of a row]."""
    return rows.contiguous().view(torch.uint8)
