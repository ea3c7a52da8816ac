"""Scenarios: the sequence of calls that a case asks about. A new one is a function.

    @scenario("repeat.bits")
    def repeatraw(s): ...

A scenario gets a Session (harness/check.py): it draws inputs, prepares the backend, and checks calls; the first check
that fails ends it. Scenarios that rest on a promise beyond the output's values (no allocation, no extra tensor, a path,
argument checks) run for backends that make it: `promises`, a set of words of PROMISES.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from harness.trace import raw

if TYPE_CHECKING:
    from harness.backend import Layer
    from harness.check import Session
    from harness.inputs import Inputs

#: What a backend may promise besides the right output.
PROMISES = {
    "errors": "bad arguments raise an error that names them, and nothing is written",
    "no_extra_tensor": "router weight on input allocates nothing more than router weight on output",
    "steady_scratch": "with a scratch object, permuting allocates nothing",
    "best_first": "route() gives a token's experts best first, and of equal ones the smaller id",
    "small_sigmoids": "route() computes sigmoids to float32's relative precision, however small they are",
    "ascending": "align() keeps an expert's pairs in ascending order, and writes all of what it returns",
    "no_wait": "a steady call reads nothing back from the device, and never waits for it",
    "graph": "a call can be captured in a graph, and replayed after inputs and weights changed in place",
    "one_build": "however many threads race the first call, one instance is built (call.instance.builds == 1)",
}


class Unsupported(Exception):
    """The case does not apply; the message is "<keyword>: reason" with a keyword of backend.UNSUPPORTED."""


class Failed(Exception):
    """The case failed: one line, the whole report; of a judged output where it is off (harness/error_map.py) and, where
    they are known, the mistake that it looks like and the stage that makes it (harness/diagnosis.py)."""

    def __init__(
        self, summary: str, report: str, error_map: dict[str, Any] | None = None, cause: str = "", stage: str = ""
    ) -> None:
        super().__init__(summary)
        self.summary, self.report, self.error_map = summary, report, error_map or {}
        self.cause, self.stage = cause, stage


SCENARIOS: dict[str, Callable[[Session], None]] = {}


def scenario(name: str) -> Callable:
    def register(function: Callable[[Session], None]) -> Callable[[Session], None]:
        assert name not in SCENARIOS, name
        SCENARIOS[name] = function
        return function

    return register


def known() -> dict[str, Callable[[Session], None]]:
    """Every scenario by its name."""
    # They register themselves.
    from harness import (  # noqa: F401
        alignment,
        arguments,
        configurations,
        errors,
        fine,
        memory,
        relations,
        routes,
        scratch,
        sequences,
        swaps,
    )

    return SCENARIOS


def play(session: Session) -> None:
    """Run the case's scenario; ValueError names the scenarios there are."""
    name, scenarios = session.case.scenario, known()
    if name not in scenarios:
        raise ValueError(f"scenario={name}: one of {', '.join(sorted(scenarios))}")
    scenarios[name](session)


def require_promise(s: Session, word: str) -> None:
    if word not in getattr(s.backend, "promises", ()):
        raise Unsupported(f"scenario: {s.backend.name} does not promise {word!r} ({PROMISES[word]})")


def start(s: Session, **changes: Any) -> tuple[Inputs, Callable]:
    """Inputs, and the prepared call."""
    given = s.draw(**changes)
    return given, s.prepare(given.case.problem, given.handed)


def batch(s: Session, given: Inputs, **changes: Any) -> Inputs:
    """Another batch for the same layer: changes of tokens, routing, ids, padded."""
    return replace(s.draw(**changes), handed=given.handed)


@scenario("once")
def once(s: Session) -> None:
    given, call = start(s)
    s.check(call, given)


@scenario("repeat.bits")
def repeatraw(s: Session) -> None:
    """The same call gives the same bits: no race, no leftover of the call before."""
    if getattr(s.backend, "deterministic", True) is not True:
        raise Unsupported(f"scenario: {s.backend.name} declares that it is not deterministic")
    given, call = start(s)
    first = s.check(call, given, "first call").clone()
    for n in (2, 3):
        again = s.check(call, given, f"call {n}")
        s.require(torch.equal(raw(first), raw(again)), f"call {n} gave other bits than the first for the same inputs")


@scenario("repeat.leak")
def repeat_leak(s: Session) -> None:
    """A call after one whose every row was NaN: nothing of it may be left in a buffer."""
    given, call = start(s)
    s.check(call, given, "before")
    poisoned = replace(given, hidden_states=torch.full_like(given.hidden_states, float("nan")))
    call(poisoned.hidden_states, poisoned.topk_weights, poisoned.topk_ids)
    s.check(call, given, "after a call full of NaN")


@scenario("path.launches")
def path_launches(s: Session) -> None:
    """The path that was promised is the path taken, by the names of the kernels launched."""
    if not hasattr(s.backend, "expected_launches"):
        raise Unsupported(f"scenario: {s.backend.name} declares no expected_launches")
    given, call = start(s)
    s.check(call, given)
    launched = s.traces[-1].launches
    required, forbidden = s.backend.expected_launches(given.case.problem)
    for part in sorted(required):
        s.require(any(part in name for name in launched), f"no kernel named *{part}* was launched, but {launched}")
    for part in sorted(forbidden):
        s.require(not any(part in name for name in launched), f"a kernel named *{part}* was launched: {launched}")


@scenario("batch.sizes")
def batch_sizes(s: Session) -> None:
    """Batches that grow and shrink under one prepared layer, zero tokens among them."""
    given, call = start(s)
    for tokens in (s.case.problem.tokens, 1, 2 * s.case.problem.tokens + 1, 0, 5, s.case.problem.tokens):
        s.check(call, batch(s, given, tokens=tokens), f"{tokens} tokens")


@scenario("batch.routings")
def batch_routings(s: Session) -> None:
    """One prepared layer sees even, skewed and one-sided routings in turn."""
    given, call = start(s)
    for routing in ("uniform", "one", "balanced", "half", "skewed"):
        s.check(call, batch(s, given, routing=routing), f"{routing} routing")


@scenario("win.no_extra_tensor")
def no_extra_tensor(s: Session) -> None:
    """Router weight on input is applied inside the kernels: no tensor more, no byte more than on output."""
    require_promise(s, "no_extra_tensor")
    given, call = start(s)
    s.check(call, given, "router weight on input")
    plain, call = start(s, router_weight_on_input=False)
    s.check(call, plain, "router weight on output")
    with_weight, without = s.traces[-2], s.traces[-1]
    more = len(with_weight.allocations) - len(without.allocations)
    s.require(more <= 0, f"router weight on input allocates {more} more tensor(s): {with_weight.allocations}")
    extra = with_weight.allocated_bytes - without.allocated_bytes
    s.require(extra <= 0, f"router weight on input allocates {extra} more bytes")


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
