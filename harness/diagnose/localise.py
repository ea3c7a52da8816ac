"""Localise the stage: a call that went wrong is replayed with its intermediate values, and each stage is asked whether
its output follows from its OWN input. The first that does not is at fault; those behind it only pass the error on.

A backend exposes them by `stages(call, hidden_states, topk_weights, topk_ids)` -> dict, in (token, slot) order, pair p
being slot p % k of token p // k; whatever it has of

    expert [P] the local expert that served the pair, -1 if none; permuted [P, K] the row that the pair got;
    x [P, K] and operand [P, I] what the GEMMs multiply, dequantized; h [P, 2I], a [P, I], slots [P, K]; out [T, K]

A stage is asked if both its input and its output are there. Bounds are worst cases, not deviations (u = 2^-23, so that
sums may truncate; gamma_n = n u / (1 - n u), Higham 2002, Accuracy and Stability, section 3.1: any order of summation):

    GEMM            gamma_{n+8} (|x| |W|^T + |b|) |weight|; an accumulator that keeps t bits adds (depth + 1) 2^-t of
                    the same sum for each of its n / depth steps
    activation      2^-22 + 8 (|z| + 1) u of act(gate), z being what the exponential is taken of; with erf, of |gate|
    quantization    the code is that of a ratio within 4 u of x / scale, the product exact to 4 u
    combine         gamma_{k+2} sum of |slot weight|

and half a step of the format in which the value is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.backend import as_backend
from harness.diagnose.patterns import runs
from harness.inputs.draw import Inputs
from harness.oracle.deviation import EPS_ACT
from harness.oracle.stages import Oracle, linear
from harness.trace.bits import raw
from harness.trace.tracing import Tracing
from reference.activation import combine_gate_up, is_gated, split_gate_up
from reference.formats import decode, fmt, round_to, ulp
from reference.moe import activated_gate, local_experts, up_factor
from reference.plan import RoundingPlan
from reference.quant import quantize_activation

U = 2.0**-23
COMBINE = "combine"
TINY = 2.0**-110  #: what flushing subnormal numbers to zero may cost


@dataclass
class Deviation:
    """Where a stage's output does not follow from its input."""

    stage: str
    where: str

    def __str__(self) -> str:
        return f"{self.stage} ({self.where})"


def localise(
    backend: Any, call: Callable[..., Tensor], inputs: Inputs, plan: RoundingPlan, got: Tensor
) -> tuple[str, str]:
    """(the stage that is at fault or "", one line about it or ""), from a replay of a call that returned `got` [T, K].

    "" and "" for backends that expose no stages, and with shared experts, which are nobody's slot.
    """
    backend = as_backend(backend)
    if backend.stages is None or inputs.case.problem.shared_experts:
        return "", ""
    try:
        with Tracing():  # as in the call itself, memory that nobody wrote is full of NaN
            seen = backend.stages(call, inputs.hidden_states, inputs.topk_weights, inputs.topk_ids)
    except Exception as error:  # it is the kernel's, and said; the verdict was reached without it
        return "", f"not localised: the replay raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    found = first_wrong({name: value.cpu() for name, value in seen.items()}, inputs, plan)
    same = "out" in seen and torch.equal(raw(decode(seen["out"].cpu())), raw(got.cpu()))
    again = "" if same else "; the replay returned another output than the call"
    if found is None:
        return "", f"none: each follows from the one before, within its rounding{again}"
    return found.stage, f"first wrong: {found}{again}"


def first_wrong(seen: dict[str, Tensor], inputs: Inputs, plan: RoundingPlan) -> Deviation | None:
    """The first stage whose recorded output [P, ...] does not follow from its recorded input."""
    o = Oracle(inputs, plan)
    for stage in (_alignment, _permutation, _quantization, _gemm_1, _activation, _requantization, _gemm_2, _combine):
        if found := stage(_Recorded(o, seen)):
            return found
    return None


class _Recorded:
    """The recorded values of the pairs that are served here, in float64, beside the oracle for them."""

    def __init__(self, o: Oracle, seen: dict[str, Tensor]) -> None:
        self.o, self.s, self.seen, self.io = o, o.s, seen, o.problem.dtype
        self.pair = self.s.token * o.ids.shape[1] + self.s.slot
        on_input = o.problem.router_weight_on_input
        # GEMM 1 multiplies by the router weight itself where neither the input nor its codes hold it already.
        in_gemm_1 = on_input and not o.quantized and o.rounding.plan.weighted_input == "accumulator"
        routed = o.rounding.router_weight(o.weights)[self.s.token, self.s.slot][:, None]
        self.weight_1 = routed if in_gemm_1 else torch.ones_like(routed)

    def __getitem__(self, name: str) -> Tensor:
        """[P, n] of the pairs that are served."""
        value = self.seen[name]
        return (decode(value) if value.dtype != torch.float64 else value)[self.pair]

    def has(self, *names: str) -> bool:
        return all(name in self.seen for name in names)

    def judge(self, stage: str, got: Tensor, right: Tensor, bound: Tensor) -> Deviation | None:
        """Whether got is right to within bound, and half a step of the io dtype; all [P, n] or, of tokens, [T, K]."""
        reach = right.abs() + bound
        bound = bound + 0.5 * ulp(reach, self.io).nan_to_num(posinf=0.0) + TINY
        near = ((got - right).abs() <= bound) | (got == right) | (got.isnan() & right.isnan())
        # What may round beyond the largest value may be infinite, or an inf - inf of a sum on its way there.
        return self.deviation(stage, ~near & (reach + bound < fmt(self.io).max))

    def deviation(self, stage: str, off: Tensor) -> Deviation | None:
        """Where off [P, n], or [T, K] for the combination, is."""
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
    if not r.has("expert"):
        return None
    o, got = r.o, r.seen["expert"].reshape(r.o.ids.shape)
    right = local_experts(o.ids, o.problem.num_experts, o.experts.expert_map)
    off = got != right
    if not off.any():
        return None
    token, slot = torch.nonzero(off)[0].tolist()
    first = f"token {token}, slot {slot}: expert {int(got[token, slot])} for {int(right[token, slot])}"
    return Deviation("alignment", f"{int(off.sum())} of {off.numel()} pairs; {first}")


def _permutation(r: _Recorded) -> Deviation | None:
    if not r.has("permuted"):
        return None
    got, right = r["permuted"], r.o.x[r.s.token]
    return r.deviation("permutation", ~((got == right) | (got.isnan() & right.isnan())))


def _quantization(r: _Recorded) -> Deviation | None:
    if not r.has("x"):
        return None
    if r.o.quantized:
        off = _misquantized(r.o.rows(), r.o.experts.activation_quant, r.o.experts.a13_scale)
        return r.deviation("quantization", off(r["x"], r.s.row))
    right = (r.o.x if (r.weight_1 != 1).any() else r.o.rows())[r.s.row]
    return r.judge("input", r["x"], right, torch.zeros_like(right))


def _misquantized(rows: Tensor, granularity: str | None, static: float | None) -> Callable[[Tensor, Tensor], Tensor]:
    """off(got [P, n], row [P]): where got is the product of no code that rows [R, n] may round to and its scale."""
    ratio, scale = quantize_activation(rows, granularity, static, rounded=False)
    ends = [round_to(ratio * (1 + s * 4 * U), "e4m3") * scale for s in (-1, 1)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)

    def off(got: Tensor, row: Tensor) -> Tensor:
        least, most = low[row], high[row]
        inside = (got >= least - least.abs() * 4 * U - TINY) & (got <= most + most.abs() * 4 * U + TINY)
        return ~inside & ~(got.isnan() & least.isnan())

    return off


def _gemm_bound(r: _Recorded, rows: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    accumulator, n = r.o.rounding.plan.accumulator, rows.shape[1]
    factor = (n + 8) * U / (1 - (n + 8) * U)
    if accumulator.bits is not None:
        factor += -(-n // accumulator.depth) * (accumulator.depth + 1) * 2.0**-accumulator.bits
    return factor * linear(r.s.expert, rows.abs(), w.abs(), None if bias is None else bias.abs(), r.o.rounding)


def _gemm_1(r: _Recorded) -> Deviation | None:
    if not r.has("x", "h"):
        return None
    e, x = r.o.experts, r.o.rounding.operand(r["x"]) * r.weight_1
    right = linear(r.s.expert, x, e.w13, e.w13_bias, r.o.rounding)
    return r.judge("GEMM 1", r["h"], right, _gemm_bound(r, x, e.w13, e.w13_bias))


def _activation(r: _Recorded) -> Deviation | None:
    if not r.has("h", "a"):
        return None
    e, h = r.o.experts, r["h"]
    if not is_gated(e.activation):
        right = combine_gate_up(h, None, e.activation)
        return r.judge("activation", r["a"], right, 4 * U * right)
    gate, up = split_gate_up(h, e.activation)
    act, factor = activated_gate(gate, e), up_factor(up, e)
    if e.activation == "gelu":
        error = (EPS_ACT + 4 * U) * gate.abs()
    else:
        z = {"gelu_tanh": 2 * gate.abs() * (1 + 0.05 * gate**2), "swigluoai": e.alpha * gate.abs()}
        error = (EPS_ACT + 8 * U * (z.get(e.activation, gate.abs()) + 1)) * act.abs() + TINY
    if r.o.rounding.plan.act_chain:
        error = error + 0.5 * ulp(act.abs() + error, r.io).nan_to_num(posinf=0.0)
    right = act * factor
    return r.judge("activation", r["a"], right, error * factor.abs() + 4 * U * right.abs())


def _requantization(r: _Recorded) -> Deviation | None:
    if not r.has("a", "operand"):
        return None
    a = r["a"]
    if not r.o.quantized:
        return r.judge("requantization", r["operand"], a, torch.zeros_like(a))
    off = _misquantized(a, r.o.experts.activation_quant, r.o.experts.a2_scale)
    return r.deviation("requantization", off(r["operand"], torch.arange(len(a))))


def _gemm_2(r: _Recorded) -> Deviation | None:
    if not r.has("operand", "slots"):
        return None
    e, operand = r.o.experts, r.o.rounding.operand(r["operand"])
    weight = r.s.weight[:, None] if r.o.rounding.plan.weight == "before_store" else torch.ones(1, 1)
    right = linear(r.s.expert, operand, e.w2, e.w2_bias, r.o.rounding) * weight
    return r.judge("GEMM 2", r["slots"], right, _gemm_bound(r, operand, e.w2, e.w2_bias) * weight.abs())


def _combine(r: _Recorded) -> Deviation | None:
    if not r.has("slots", "out"):
        return None
    o, plan, k = r.o, r.o.rounding.plan, r.o.ids.shape[1]
    slots = r["slots"]
    right_slots = slots if plan.weight == "before_store" else slots * r.s.weight[:, None]
    zero = torch.zeros_like(o.x)
    right = zero.index_add(0, r.s.token, right_slots)
    size = zero.index_add(0, r.s.token, right_slots.abs())
    bound = (k + 2) * U * size
    if plan.weight == "rounded":
        bound = bound + k * ulp(size, r.io).nan_to_num(posinf=0.0)
    if plan.combine == "io":
        bound = bound + k * ulp(size, r.io).nan_to_num(posinf=0.0)
    return r.judge(COMBINE, decode(r.seen["out"]), right, bound)
