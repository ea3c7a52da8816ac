"""Which problems have an exact fill (inputs/exact_fill.py): arithmetic on a Problem, no tensors."""

from __future__ import annotations

import math

from harness.problem.case import Problem, Quant
from reference.scheme import Format, common_scale, power_of_two_above

#: What the weights of the exact fill are multiples of (inputs/exact_fill.py): a sign pattern in a row of the gate, and
#: what the columns that choose a token's class add to it, on and off.
GATE, ON, OFF = 16, 112, -192
#: Its activations: UNIT times these.
UNIT, ACTIVATIONS = 32, (2, 3, 4, 5, 6, 9, 12, 15)


def inexact(problem: Problem) -> str | None:
    """None, or why no exact fill exists for this problem: "fill: ..."."""
    dynamic = problem.quant.dynamic if problem.quant else None
    if problem.activation == "swigluoai" and (problem.limit or 7) < 128:
        return "fill: swigluoai does not saturate below a limit of 128"
    if problem.limit is not None and (problem.limit < 128 or math.frexp(problem.limit)[0] != 0.5):
        return f"fill: a clamp at {problem.limit:g} is exact only for powers of two from 128"
    if dynamic and problem.activation == "relu2":
        return f"fill: relu2 cannot reach {dynamic.codes.max:g}*2^j, so a dynamic scale is no power of two"
    if dynamic and problem.router_weight_on_input and (problem.limit or problem.activation == "swigluoai"):
        largest = f"{dynamic.codes.max:g}*2^j"
        return f"fill: {largest} cannot be reached for two router weights at once under a clamp or (up + 1)"
    if problem.hidden_size < 32 or problem.intermediate_size < 8:
        return "fill: exact needs hidden_size >= 32 and intermediate_size >= 8"
    if problem.quant and (reason := _beyond_codes(problem.quant)):
        return reason
    return None


def pair_weight(quant: Quant | None) -> float:
    """The weight of the two columns of x that fix a dynamic scale, beside 1 of the others: small, but no code of 0."""
    widest = abs(OFF) / GATE / 2.0**-4
    codes = quant.weights.codes if quant else None
    return 2.0**-4 if codes is None or 2 * widest <= codes.max / codes.step(0) else 2.0**-2


def forced_gate(codes: Format) -> float:
    """The gate of the rows that fix a dynamic scale: the largest code times a power of two, saturated as ON is."""
    return codes.max * power_of_two_above(ON / codes.max)


def _beyond_codes(quant: Quant) -> str | None:
    """None, or that no scale makes codes of the fill's weights where they share one."""
    pair, dynamic = pair_weight(quant), quant.dynamic
    gate: list[float] = [GATE, ON, abs(OFF)]
    up = [1.0]
    if dynamic:
        gate, up = [*gate, GATE * pair], [*up, pair]
    forced: list[list[float]] = [[forced_gate(dynamic.codes)], [7.0], [8.0, 16.0]] if dynamic else []
    each_row = [gate, up, [1.0, 0.25, 0.125], *forced]
    one_scale = quant.weights.granularity.rows == 1
    together = [[value for row in each_row for value in row]]
    for values in each_row if one_scale else together:
        if common_scale(values, quant.weights.codes) is None:
            return f"fill: no scale makes {quant.weight_format} codes of the weights of an exact fill"
    scales = [forced_gate(dynamic.codes) * factor / dynamic.codes.max for factor in (8, 16)] if dynamic else []
    if dynamic and not all(dynamic.codes.holds(UNIT * n / scale) for n in ACTIVATIONS for scale in scales):
        return f"fill: {dynamic.codes.name} has no codes of the activations of an exact fill"
    return None
