"""Scenarios of a backend's choices: every tile configuration, and the same bits in batches of any size.

For backends with configurations(problem), which maps names to keyword options of prepare(); and for backends that
declare batch_invariant: True, or "configured" if they are invariant under one fixed configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.backend import Unsupported
from harness.inputs.draw import Inputs
from harness.problem.case import Problem
from harness.scenarios.metamorphic import tokens_of
from harness.scenarios.registry import scenario
from harness.session.session import Session


def configurations(s: Session, problem: Problem) -> dict[str, dict[str, Any]]:
    """The backend's configurations by name; Unsupported if it has none."""
    if s.backend.configurations is None:
        raise Unsupported(f"scenario: {s.backend.name} has no configurations")
    choice = s.backend.configurations(problem)
    s.require(bool(choice), "configurations() is empty; leave it out if there is nothing to choose from")
    return choice


@scenario("config.all")
def every_configuration(s: Session) -> None:
    """Every configuration that any batch may get computes this batch."""
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
    declared, problem = s.backend.batch_invariant, s.case.problem
    if declared is False:
        raise Unsupported(f"scenario: {s.backend.name} does not declare batch_invariant")
    if problem.quant is not None and problem.quant.over_rows:
        raise Unsupported("quant: a dynamic per-tensor scale belongs to the whole batch")
    inputs = s.draw()
    if declared is True:
        _check_batches(s, inputs, s.prepare(problem, inputs.backend_layer), "")
        return
    choice = configurations(s, problem)
    for name in dict.fromkeys((next(iter(choice)), list(choice)[-1])):  # the table's two ends: each costs five calls
        _check_batches(s, inputs, s.prepare(problem, inputs.backend_layer, **choice[name]), f", configuration {name}")


def _check_batches(s: Session, inputs: Inputs, call: Callable[..., Tensor], how: str) -> None:
    tokens = inputs.case.problem.tokens
    every = torch.arange(tokens, device=inputs.hidden_states.device)
    whole = s.check(call, inputs, f"the whole batch{how}").clone()
    batches = {
        "the first token alone": every[:1],
        "the last token alone": every[-1:],
        "three of the middle": every[tokens // 2 :][:3],
        "three times the batch": every.repeat(3),
    }
    for name, rows in batches.items():
        got, _ = s.call(call, tokens_of(inputs, rows), name + how)
        wrong = torch.nonzero((_bits(got) != _bits(whole[rows])).any(1)).flatten().tolist()
        s.require(
            not wrong,
            f"{name}{how}: other bits than in the whole batch in {len(wrong)} of {len(rows)} rows: {wrong[:6]}",
        )


def _bits(rows: Tensor) -> Tensor:
    """The rows as bytes, [T, bytes of a row] uint8."""
    return rows.contiguous().view(torch.uint8)
