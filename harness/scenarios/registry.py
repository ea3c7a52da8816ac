"""How to write a scenario, the calls of a case and their order: a function of a Session.

    @scenario("repeat.bits")
    def repeat_bits(s: Session) -> None: ...

The session (session/session.py) draws inputs, prepares the backend and checks calls; the first check that fails ends
the scenario. A scenario that tests a promise beyond the output's values (no allocation, no extra tensor, a path,
argument checks) runs for backends that make the promise: `promises`, a set of words of PROMISES.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import PROMISES, Layer, Unsupported
from harness.diagnose.failure import Failed
from harness.diagnose.report import Report
from harness.inputs.draw import Inputs
from harness.session.session import Session
from harness.trace.bits import raw

Scenario = Callable[[Session], object]
SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str) -> Callable[[Scenario], Scenario]:
    """Register a function as the scenario of this name."""

    def register(function: Scenario) -> Scenario:
        assert name not in SCENARIOS, name
        SCENARIOS[name] = function
        return function

    return register


def require_promise(s: Session, word: str) -> None:
    """Unsupported unless the backend makes the promise."""
    if word not in s.backend.promises:
        raise Unsupported(f"scenario: {s.backend.name} does not promise {word!r} ({PROMISES[word]})")


def start(s: Session, **changes: Any) -> tuple[Inputs, Callable[..., Tensor]]:
    """Draw inputs and prepare their layer; returns (inputs, call). changes: of fields of Problem or Case."""
    inputs = s.draw(**changes)
    return inputs, s.prepare(inputs.case.problem, inputs.backend_layer)


def batch(s: Session, inputs: Inputs, **changes: Any) -> Inputs:
    """Draw another batch for the same layer. changes: of tokens, routing, ids, padded."""
    return replace(s.draw(**changes), backend_layer=inputs.backend_layer)


def must_refuse(
    s: Session, what: str, words: tuple[str, ...], attempt: Callable[[], Any], untouched: dict[str, Tensor]
) -> None:
    """Failed unless attempt() raises a ValueError or TypeError that contains one of the words, and leaves the tensors
    `untouched` as they were. what: the bad argument, for the report."""
    before = {name: raw(t).clone() for name, t in untouched.items()}
    try:
        attempt()
    except (ValueError, TypeError) as error:
        message = str(error)
    else:
        raise Failed(Report(f"accepted: {what}"))
    named = any(word in message for word in words)
    s.require(named, f"{what}: the error names none of {', '.join(words)}: {message!r}")
    s.device.synchronize()
    for name, tensor in untouched.items():
        s.require(torch.equal(raw(tensor), before[name]), f"{what}: refused, but {name} was written before")


def weak_references(layer: Layer) -> list[weakref.ref[Tensor]]:
    """Weak references to the layer's tensors: dead once the tensors are freed."""
    return [weakref.ref(t) for t in layer.tensors().values()]
