"""Scenarios: the sequence of calls that a case asks about. A new one is a function.

    @scenario("repeat.bits")
    def repeatraw(s): ...

A scenario gets a Session (session/session.py): it draws inputs, prepares the backend and checks calls. The first
check that fails ends it. Scenarios that rest on a promise beyond the output's values (no allocation, no extra tensor, a
path, argument checks) run for backends that make it: `promises`, a set of words of PROMISES.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from harness.backend import PROMISES, Layer, Unsupported
from harness.diagnose.failure import Failed
from harness.inputs.draw import Inputs
from harness.session.session import Session
from harness.trace.bits import raw

Scenario = Callable[[Session], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str) -> Callable:
    def register(function: Scenario) -> Scenario:
        assert name not in SCENARIOS, name
        SCENARIOS[name] = function
        return function

    return register


def require_promise(s: Session, word: str) -> None:
    if word not in getattr(s.backend, "promises", ()):
        raise Unsupported(f"scenario: {s.backend.name} does not promise {word!r} ({PROMISES[word]})")


def start(s: Session, **changes: Any) -> tuple[Inputs, Callable]:
    """Inputs, and the prepared call."""
    inputs = s.draw(**changes)
    return inputs, s.prepare(inputs.case.problem, inputs.backend_layer)


def batch(s: Session, inputs: Inputs, **changes: Any) -> Inputs:
    """Another batch for the same layer: changes of tokens, routing, ids, padded."""
    return replace(s.draw(**changes), backend_layer=inputs.backend_layer)


def must_refuse(
    s: Session, what: str, words: tuple[str, ...], attempt: Callable[[], Any], untouched: dict[str, torch.Tensor]
) -> None:
    """attempt() must raise a ValueError or TypeError that holds one of the words, and leave these tensors untouched."""
    before = {name: raw(t).clone() for name, t in untouched.items()}
    try:
        attempt()
    except (ValueError, TypeError) as error:
        message = str(error)
    else:
        raise Failed(f"accepted: {what}", f"accepted: {what}")
    named = any(word in message for word in words)
    s.require(named, f"{what}: the error names none of {', '.join(words)}: {message!r}")
    s.device.synchronize()
    for name, tensor in untouched.items():
        s.require(torch.equal(raw(tensor), before[name]), f"{what}: refused, but {name} was written before")


def kept_alive(layer: Layer) -> list[weakref.ref]:
    """Weak references to the layer's tensors."""
    return [weakref.ref(t) for t in layer.tensors().values()]
