"""Which problems have an exact fill (inputs/exact_fill.py): arithmetic on a Problem, no tensors."""

from __future__ import annotations

import math

from harness.problem.case import Problem

DYNAMIC = ("tensor", "token", "group")


def inexact(problem: Problem) -> str | None:
    """None, or why no exact fill exists for this problem: "fill: ..."."""
    dynamic = problem.quant is not None and problem.quant.activation in DYNAMIC
    if problem.activation == "swigluoai" and (problem.limit or 7) < 128:
        return "fill: swigluoai does not saturate below a limit of 128"
    if problem.limit is not None and (problem.limit < 128 or math.frexp(problem.limit)[0] != 0.5):
        return f"fill: a clamp at {problem.limit:g} is exact only for powers of two from 128"
    if problem.activation == "relu2" and dynamic:
        return "fill: relu2 cannot reach 448*2^j, so a dynamic scale is no power of two"
    if dynamic and problem.router_weight_on_input and (problem.limit or problem.activation == "swigluoai"):
        return "fill: 448*2^j cannot be reached for two router weights at once under a clamp or (up + 1)"
    if problem.hidden_size < 32 or problem.intermediate_size < 8:
        return "fill: exact needs hidden_size >= 32 and intermediate_size >= 8"
    return None
