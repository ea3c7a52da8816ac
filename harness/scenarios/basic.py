"""Scenarios for every backend: one call, repeated calls, growing batches, the promised path."""

from __future__ import annotations

from dataclasses import replace

import torch

from harness.backend import Unsupported
from harness.scenarios.registry import batch, require_promise, scenario, start
from harness.session.session import Session
from harness.trace.bits import raw

#: Bits of a router weight. With the 8 bits of an exact output they fit into float32: only the store rounds.
BITS = 12


@scenario("once.fine_weights")
def fine_weights(s: Session) -> None:
    """Router weights of 12 bits: the only slot's output is exact, and is rounded once, after its weight is applied."""
    problem = s.case.problem
    if problem.router_weight_on_input:
        raise Unsupported("router_weight_on_input: a weighted input is not exact")
    if problem.top_k + problem.shared_experts > 1:
        raise Unsupported("scenario: a sum over slots rounds in more than one way")
    if any(plan.router_weight == "io" for plan in s.plans(problem)):
        raise Unsupported(f"scenario: {s.backend.name} declares that it rounds router weights")
    inputs, call = start(s)
    draw = torch.Generator().manual_seed(s.case.seed)
    steps = torch.randint(2 ** (BITS - 1), 2**BITS, inputs.topk_weights.shape, generator=draw)
    weights = (steps.float() * 2.0**-BITS).to(inputs.topk_weights.device)
    s.check(call, replace(inputs, topk_weights=weights), "router weights of 12 bits")


@scenario("once")
def once(s: Session) -> None:
    """One call."""
    inputs, call = start(s)
    s.check(call, inputs)


@scenario("repeat.bits")
def repeat_bits(s: Session) -> None:
    """Three calls with the same inputs return the same bits: no race, no leftover of an earlier call."""
    if not s.backend.deterministic:
        raise Unsupported(f"scenario: {s.backend.name} declares that it is not deterministic")
    inputs, call = start(s)
    first = s.check(call, inputs, "first call").clone()
    for n in (2, 3):
        again = s.check(call, inputs, f"call {n}")
        s.require(torch.equal(raw(first), raw(again)), f"call {n} gave other bits than the first for the same inputs")


@scenario("repeat.leak")
def repeat_leak(s: Session) -> None:
    """A call after a call with hidden_states full of NaN: no buffer keeps a NaN."""
    inputs, call = start(s)
    s.check(call, inputs, "before")
    poisoned = replace(inputs, hidden_states=torch.full_like(inputs.hidden_states, float("nan")))
    call(poisoned.hidden_states, poisoned.topk_weights, poisoned.topk_ids)
    s.check(call, inputs, "after a call full of NaN")


@scenario("path.launches")
def path_launches(s: Session) -> None:
    """The names of the launched kernels are those of the promised path."""
    if s.backend.expected_launches is None:
        raise Unsupported(f"scenario: {s.backend.name} declares no expected_launches")
    inputs, call = start(s)
    s.check(call, inputs)
    launched = s.traces[-1].launches
    required, forbidden = s.backend.expected_launches(inputs.case.problem)
    for part in sorted(required):
        s.require(any(part in name for name in launched), f"no kernel named *{part}* was launched, but {launched}")
    for part in sorted(forbidden):
        s.require(not any(part in name for name in launched), f"a kernel named *{part}* was launched: {launched}")


@scenario("batch.sizes")
def batch_sizes(s: Session) -> None:
    """Batches that grow and shrink under one prepared layer, including an empty batch."""
    inputs, call = start(s)
    for tokens in (s.case.problem.tokens, 1, 2 * s.case.problem.tokens + 1, 0, 5, s.case.problem.tokens):
        s.check(call, batch(s, inputs, tokens=tokens), f"{tokens} tokens")


@scenario("batch.routings")
def batch_routings(s: Session) -> None:
    """Even, skewed and one-sided routings in turn under one prepared layer."""
    inputs, call = start(s)
    for routing in ("uniform", "one", "balanced", "half", "skewed"):
        s.check(call, batch(s, inputs, routing=routing), f"{routing} routing")


@scenario("win.no_extra_tensor")
def no_extra_tensor(s: Session) -> None:
    """A router weight on the input is applied inside the kernels: it allocates no tensor and no byte more than a router
    weight on the output."""
    require_promise(s, "no_extra_tensor")
    inputs, call = start(s)
    s.check(call, inputs, "router weight on input")
    plain, call = start(s, router_weight_on_input=False)
    s.check(call, plain, "router weight on output")
    with_weight, without = s.traces[-2], s.traces[-1]
    more = len(with_weight.allocations) - len(without.allocations)
    s.require(more <= 0, f"router weight on input allocates {more} more tensor(s): {with_weight.allocations}")
    extra = with_weight.allocated_bytes - without.allocated_bytes
    s.require(extra <= 0, f"router weight on input allocates {extra} more bytes")
