"""Router weights of more bits than a 16-bit format keeps: whoever rounds them, or what they meet, gives other bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from harness.scenario import Unsupported, scenario, start

if TYPE_CHECKING:
    from harness.check import Session

#: Of a weight: together with the eight of an exact output they fit into float32, so nothing rounds but the store.
BITS = 12


@scenario("once.fine_weights")
def fine_weights(s: Session) -> None:
    """One slot's output is exact; times its weight it is rounded once, wherever the weight is applied after GEMM 2."""
    problem = s.case.problem
    if problem.router_weight_on_input:
        raise Unsupported("router_weight_on_input: a weighted input is not exact")
    if problem.top_k + problem.shared_experts > 1:
        raise Unsupported("scenario: a sum over slots rounds in more than one way")
    if any(plan.router_weight == "io" for plan in s.plans(problem)):
        raise Unsupported(f"scenario: {s.backend.name} declares that it rounds router weights")
    given, call = start(s)
    draw = torch.Generator().manual_seed(s.case.seed)
    steps = torch.randint(2 ** (BITS - 1), 2**BITS, given.topk_weights.shape, generator=draw)
    weights = (steps.float() * 2.0**-BITS).to(given.topk_weights.device)
    s.check(call, replace(given, topk_weights=weights, variant="fine router weights"), "router weights of 12 bits")
