"""Localise the stage: a failed call is replayed with its intermediate values, and each stage is checked alone.

The right output of a stage is the pipeline's stage (reference/moe.py) applied to the recorded INPUT of the stage. The
first stage whose recorded output differs is at fault; the stages after it only pass the error on.

A backend exposes the values by `stages(call, hidden_states, topk_weights, topk_ids)` -> dict, in (token, slot) order,
pair p is slot p % k of token p // k. Any of these:

    expert [P] the local expert that served the pair, -1 if none; permuted [P, K] the row that the pair got;
    x [P, K] and operand [P, I] the operands of the GEMMs, dequantized; h [P, 2I], a [P, I], slots [P, K]; out [T, K]

A stage is checked if both its input and its output are there. Bounds are worst cases, not deviations (u = 2^-23: sums
may truncate; gamma_n = n u / (1 - n u), Higham 2002, Accuracy and Stability, section 3.1: any order of summation):

    GEMM            gamma_{n+8} (|x| |W|^T + |b|) |weight|; an accumulator that keeps t bits adds (depth + 1) 2^-t of
                    the same sum for each of its n / depth steps
    activation      2^-22 + 8 (|z| + 1) u of act(gate), z the argument of the exponential; with erf, of |gate|
    quantization    the code is that of a ratio within 4 u of x / scale, the product exact to 4 u
    combine         gamma_{k+2} sum of |slot weight|

and half a step of the format in which the value is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.backend import as_backend
from harness.base.raised import describe_error
from harness.diagnose.patterns import runs
from harness.inputs.draw import Inputs
from harness.oracle.deviation import EPS_ACT
from harness.oracle.stages import Oracle
from harness.trace.bits import raw
from harness.trace.tracing import Tracing
from reference import moe
from reference.activation import split_gate_up
from reference.formats import decode, fmt, ulp
from reference.moe import Experts, Stage, Values, activated_gate, local_experts, up_factor
from reference.plan import RoundingPlan
from reference.quant import saturated

U = 2.0**-23
COMBINE = "combine"
TINY = 2.0**-110  #: bound of the error of flushing subnormal numbers to zero


@dataclass
class Deviation:
    """A stage whose output does not follow from its input, and the places."""

    stage: str
    where: str

    def __str__(self) -> str:
        return f"{self.stage} ({self.where})"


def localise(
    backend: Any, call: Callable[..., Tensor], inputs: Inputs, plan: RoundingPlan, got: Tensor
) -> tuple[str, str]:
    """Return (the stage at fault or "", one line about it or "") from a replay of a call that returned `got` [T, K].

    "" and "" for backends that expose no stages, and for shared experts, which have no slot.
    """
    backend = as_backend(backend)
    if backend.stages is None or inputs.case.problem.shared_experts:
        return "", ""
    try:
        with Tracing():  # as in the call itself, unwritten memory is full of NaN
            seen = backend.stages(call, inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the kernel's own; the verdict does not need the replay
        return "", f"not localised: the replay raised {describe_error(error)}"
    wrong = first_wrong({name: value.cpu() for name, value in seen.items()}, inputs, plan)
    same = "out" in seen and torch.equal(raw(decode(seen["out"].cpu())), raw(got.cpu()))
    again = "" if same else "; the replay returned another output than the call"
    if wrong is None:
        return "", f"none: each follows from the one before, within its rounding{again}"
    return wrong.stage, f"first wrong: {wrong}{again}"


def first_wrong(seen: dict[str, Tensor], inputs: Inputs, plan: RoundingPlan) -> Deviation | None:
    """Return the first stage whose recorded output [P, ...] does not follow from its recorded input, or None."""
    recorded = _Recorded(Oracle(inputs, plan), seen)
    for check, names in _CHECKS:
        if all(name in seen for name in names) and (wrong := check(recorded)):
            return wrong
    return None


class _Recorded:
    """The recorded values of the pairs that are served here, in float64, and the oracle for them."""

    def __init__(self, o: Oracle, seen: dict[str, Tensor]) -> None:
        self.o, self.s, self.seen, self.io = o, o.s, seen, o.problem.dtype
        self.pair = self.s.token * o.ids.shape[1] + self.s.slot
        on_input = o.problem.router_weight_on_input
        # GEMM 1 multiplies by the router weight itself where neither the input nor its codes hold it already.
        in_gemm_1 = on_input and not o.quantized and o.rounding.plan.weighted_input == "accumulator"
        routed = o.rounding.router_weight(o.weights)[self.s.token, self.s.slot][:, None]
        self.weight_1 = routed if in_gemm_1 else torch.ones_like(routed)

    def run(self, stage: Stage, experts: Experts | None = None, **recorded: Tensor) -> Values:
        """Return the values after a stage of the pipeline that reads these recorded values; nothing is stored."""
        values: Any = recorded
        return stage(replace(self.s, **values), experts or self.o.experts, replace(self.o.rounding, repeat=False))

    def __getitem__(self, name: str) -> Tensor:
        """The recorded value [P, n] of the pairs that are served."""
        value = self.seen[name]
        return (decode(value) if value.dtype != torch.float64 else value)[self.pair]

    def judge(self, stage: str, got: Tensor, right: Tensor, bound: Tensor) -> Deviation | None:
        """Compare got with right to within bound and half a step of the io dtype; all [P, n] or, of tokens, [T, K]."""
        reach = right.abs() + bound
        bound = bound + 0.5 * ulp(reach, self.io).nan_to_num(posinf=0.0) + TINY
        near = ((got - right).abs() <= bound) | (got == right) | (got.isnan() & right.isnan())
        # A value that may round beyond the largest one may be infinite, or an inf - inf of a sum on its way there.
        return self.deviation(stage, ~near & (reach + bound < fmt(self.io).max))

    def deviation(self, stage: str, off: Tensor) -> Deviation | None:
        """Return the places where off [P, n] (bool; [T, K] of the combination) is set, None if there are none."""
        if not off.any():
            return None
        rows, columns, tokens = off.any(1), off.any(0), torch.zeros(len(self.o.x), dtype=torch.bool)
        parts = [f"{int(off.sum())} of {off.numel()} values"]
        if stage == COMBINE:
            tokens = rows
        else:
            tokens[self.s.token[rows]] = True
            experts = self.s.expert[rows].unique().tolist()
            every = len(experts) == len(self.s.expert.unique()) > 1
            parts.append("rows of every expert" if every else f"rows of expert {', '.join(map(str, experts[:8]))}")
        parts.append("every token" if tokens.all() else f"tokens {runs(tokens)}")
        parts.append("every column" if columns.all() else f"columns {runs(columns)}")
        return Deviation(stage, "; ".join(parts))


def _alignment(r: _Recorded) -> Deviation | None:
    o, got = r.o, r.seen["expert"].reshape(r.o.ids.shape)
    right = local_experts(o.ids, o.problem.num_experts, o.experts.expert_map)
    off = got != right
    if not off.any():
        return None
    token, slot = torch.nonzero(off)[0].tolist()
    first = f"token {token}, slot {slot}: expert {int(got[token, slot])} for {int(right[token, slot])}"
    return Deviation("alignment", f"{int(off.sum())} of {off.numel()} pairs; {first}")


def _permutation(r: _Recorded) -> Deviation | None:
    got, right = r["permuted"], r.o.x[r.s.token]
    return r.deviation("permutation", ~((got == right) | (got.isnan() & right.isnan())))


def _quantization(r: _Recorded) -> Deviation | None:
    ratio, scale, row = r.s.x_ratio, r.s.x_scale, r.s.row
    if ratio is not None and scale is not None:
        return r.deviation("quantization", _misquantized(r, r["x"], ratio[row], scale[row]))
    right = (r.o.x if (r.weight_1 != 1).any() else r.o.rows())[row]
    return r.judge("input", r["x"], right, torch.zeros_like(right))


def _gemm_1(r: _Recorded) -> Deviation | None:
    x = r.o.rounding.operand(r["x"]) * r.weight_1
    row = torch.arange(len(x))
    size = r.run(moe.gemm_1, _absolute(r.o.experts), x=x.abs(), row=row).h
    return r.judge("GEMM 1", r["h"], r.run(moe.gemm_1, x=x, row=row).h, _gemm_bound(r, x.shape[1], size))


def _activation(r: _Recorded) -> Deviation | None:
    right = r.run(moe.activate, h=r["h"]).a
    return r.judge("activation", r["a"], right, _activation_bound(r, r["h"], right))


def _requantization(r: _Recorded) -> Deviation | None:
    values = r.run(moe.quantize_activation, a=r["a"])
    ratio, scale = values.a_ratio, values.a_scale
    if ratio is not None and scale is not None:
        return r.deviation("requantization", _misquantized(r, r["operand"], ratio, scale))
    # The recorded operand is not rounded to tf32 yet: GEMM 2 does that.
    return r.judge("requantization", r["operand"], values.a, torch.zeros_like(values.a))


def _gemm_2(r: _Recorded) -> Deviation | None:
    operand = r.o.rounding.operand(r["operand"])
    weight = r.s.weight[:, None] if r.o.rounding.plan.weight == "before_store" else torch.ones(1, 1)
    right = r.run(moe.gemm_2, operand=operand).y * weight
    size = r.run(moe.gemm_2, _absolute(r.o.experts), operand=operand.abs()).y
    return r.judge("GEMM 2", r["slots"], right, _gemm_bound(r, operand.shape[1], size) * weight.abs())


def _combine(r: _Recorded) -> Deviation | None:
    plan, k, slots = r.o.rounding.plan, r.o.ids.shape[1], r["slots"]
    if plan.weight != "before_store":
        slots = r.run(moe.weigh, y=slots).slots
    right, size = r.run(moe.combine, slots=slots).out, r.run(moe.combine, slots=slots.abs()).out
    bound = (k + 2) * U * size
    for rounded in (plan.weight == "rounded", plan.combine == "io"):
        if rounded:
            bound = bound + k * ulp(size, r.io).nan_to_num(posinf=0.0)
    return r.judge(COMBINE, decode(r.seen["out"]), right, bound)


#: The checks in the order of the stages, and the recorded values that each needs.
_CHECKS: tuple[tuple[Callable[[_Recorded], Deviation | None], tuple[str, ...]], ...] = (
    (_alignment, ("expert",)),
    (_permutation, ("permuted",)),
    (_quantization, ("x",)),
    (_gemm_1, ("x", "h")),
    (_activation, ("h", "a")),
    (_requantization, ("a", "operand")),
    (_gemm_2, ("operand", "slots")),
    (_combine, ("slots", "out")),
)


def _absolute(experts: Experts) -> Experts:
    """Return the experts with the absolute values of their weights and biases."""
    w13_bias = None if experts.w13_bias is None else experts.w13_bias.abs()
    w2_bias = None if experts.w2_bias is None else experts.w2_bias.abs()
    return replace(experts, w13=experts.w13.abs(), w2=experts.w2.abs(), w13_bias=w13_bias, w2_bias=w2_bias)


def _gemm_bound(r: _Recorded, n: int, size: Tensor) -> Tensor:
    """Return the error of sums of n products whose absolute values add up to size."""
    accumulator = r.o.rounding.plan.accumulator
    factor = (n + 8) * U / (1 - (n + 8) * U)
    if accumulator.bits is not None:
        factor += -(-n // accumulator.depth) * (accumulator.depth + 1) * 2.0**-accumulator.bits
    return factor * size


def _activation_bound(r: _Recorded, h: Tensor, right: Tensor) -> Tensor:
    """Return the error of activation(h) = right [P, I]."""
    e = r.o.experts
    gate, up = split_gate_up(h, e.activation)
    if up is None:
        return 4 * U * right
    act, factor = activated_gate(gate, e), up_factor(up, e)
    if e.activation == "gelu":
        error = (EPS_ACT + 4 * U) * gate.abs()
    else:
        z = {"gelu_tanh": 2 * gate.abs() * (1 + 0.05 * gate**2), "swigluoai": e.alpha * gate.abs()}
        error = (EPS_ACT + 8 * U * (z.get(e.activation, gate.abs()) + 1)) * act.abs() + TINY
    if r.o.rounding.plan.act_chain:
        error = error + 0.5 * ulp(act.abs() + error, r.io).nan_to_num(posinf=0.0)
    return error * factor.abs() + 4 * U * right.abs()


def _misquantized(r: _Recorded, got: Tensor, ratio: Tensor, scale: Tensor) -> Tensor:
    """Return where got is the product of scale and no code to which ratio may round: all [P, n]."""
    scheme = r.o.experts.activation_quant
    assert scheme is not None
    ends = [saturated(ratio * (1 + s * 4 * U), scheme) * scale for s in (-1, 1)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    inside = (got >= low - low.abs() * 4 * U - TINY) & (got <= high + high.abs() * 4 * U + TINY)
    return ~inside & ~(got.isnan() & low.isnan())
