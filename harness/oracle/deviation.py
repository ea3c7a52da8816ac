"""The oracle's output and, per element, the variance of a correct kernel's difference from it.

Every rounding of the backend's plan is an independent error, propagated to the output to second moments, stage by stage
(`STAGES`). The oracle treats the roundings of computed values in one of two ways:

unrounded          Each declared rounding of step s adds s^2/12. One-sided: a kernel finer than its plan passes. For
                   bf16, fp16, fp32 and weight-only fp8.
repeats_roundings  The oracle repeats the declared roundings. Flips remain: a value near a tie rounds the other way.
                   Tight enough to see errors below the step of fp8, but a wrong plan accuses correct kernels. For
                   quantized activations.

Formulas (u = 2^-24, mean square of one float32 rounding error u^2/6 of the value's square):
a sum of n products: u^2/6 (n/2 sum of squares + n/3 value^2), the second-moment form of the probabilistic bound of
Higham & Mary 2019 (SISC 41(5) A2815); a tensor core that truncates to t bits in depth-m steps, promoted every q:
4^-t (s^2/3 + s/2) sum of squares with s = min(n, q)/m; a flip: s^2 min(0.798 sd/s, 1/6), the mean over positions of
the tie of a normal error of deviation sd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.inputs.draw import Inputs
from harness.oracle.experts import oracle_experts
from reference.activation import combine_gate_up, is_gated, split_gate_up
from reference.formats import decode, fmt, ulp
from reference.moe import Experts, Rounding, Values, activated_gate, forward, up_factor
from reference.plan import Accumulator, RoundingPlan
from reference.quant import U32, code_step, near_tie, saturates

EPS_ACT = 2.0**-22  #: relative error of a device's exp, erf or tanh
FLOAT32_OP = U32**2 / 6


@dataclass
class Expected:
    """The oracle's answer for one call under one plan."""

    plan: RoundingPlan
    repeats_roundings: bool  #: whether `out` repeats the plan's roundings of computed values
    out: Tensor  #: [T, K] float64, the final store not rounded
    variance: Tensor  #: [T, K]
    variance_without_flips: Tensor  #: [T, K] the same as `variance` if roundings are not repeated
    max_flip: Tensor  #: [T, K] the largest change by one flip; zero if roundings are not repeated
    flips: Tensor  #: [T] predicted number of flips that touch the row; zero if roundings are not repeated
    tie_sigma: Tensor  #: [T, K] deviation from input codes so near a tie that either choice is right
    topk_experts: Tensor  #: [P] and [P]: the local expert and the token of every valid pair
    topk_tokens: Tensor
    rne_accumulator: bool


@dataclass
class Spread:
    """Second moments of an error, value by value."""

    variance: Tensor
    variance_without_flips: Tensor
    flips: Tensor  #: per row, the predicted number of flips
    max_flip: Tensor  #: the largest change by one flip
    ties: Tensor | None = None  #: variance from input codes near a tie; None if there is none

    def map(self, change: Callable[[Tensor], Tensor]) -> Spread:
        """Change every variance."""
        ties = None if self.ties is None else change(self.ties)
        return Spread(change(self.variance), change(self.variance_without_flips), self.flips, self.max_flip, ties)

    def plus(self, variance: Tensor) -> Spread:
        """Add an independent error."""
        return replace(
            self,
            variance=self.variance + variance,
            variance_without_flips=self.variance_without_flips + variance,
        )

    def times(self, factor: Tensor) -> Spread:
        """Multiply the values by a factor."""
        return replace(self.map(lambda v: v * factor**2), max_flip=self.max_flip * factor.abs())

    def stored(self, value: Tensor, where: str, rounding: Rounding) -> Spread:
        """Store the values in the format of the plan: a rounding if that is "io"."""
        if where != "io":
            return self
        return self.rounded(value, _ulp(value, rounding.io, self.variance), rounding.repeat)

    def rounded(self, value: Tensor, step: Tensor, repeat: bool) -> Spread:
        """Round the values to this step: it adds step^2/12, or the mean over flips if the oracle repeats it."""
        step = torch.where(torch.isfinite(value), step, 0.0)
        if not repeat:
            return self.plus(step**2 / 12)
        positive = step > 0
        probability = torch.where(
            positive, (0.798 * self.variance.sqrt() / torch.where(positive, step, 1.0)).clamp(max=1 / 6), 0.0
        )
        return replace(
            self,
            variance=self.variance + step**2 * probability,
            flips=self.flips + torch.nan_to_num(probability).sum(1),
            max_flip=torch.maximum(self.max_flip, torch.where(probability > 0, step, 0.0)),
        )

    def round_either_way(self, step: Tensor, where: Tensor) -> Spread:
        """Round either way at these places: a difference of a step, every other time."""
        flip = torch.where(where, step, 0.0)
        return replace(
            self,
            variance=self.variance + flip**2 / 2,
            flips=self.flips + where.sum(1) / 2,
            max_flip=torch.maximum(self.max_flip, flip),
        )


def _ulp(value: Tensor, form: str, variance: Tensor | None = None) -> Tensor:
    """Return the step at |value|, or at |value| + sigma, since the value may be smaller than its own error."""
    magnitude = value.abs() if variance is None else value.abs() + variance.sqrt()
    return ulp(torch.nan_to_num(magnitude, posinf=fmt(form).max).clamp(max=fmt(form).max), form)


def summation(n: int, squares: Tensor, value: Tensor, accumulator: Accumulator) -> Tensor:
    """Return the variance of a sum of n products whose squares sum to `squares`."""
    variance = FLOAT32_OP * (n / 2 * squares + n / 3 * value**2)
    if accumulator.bits is not None:
        promote = accumulator.promote or n
        steps = min(n, promote) / accumulator.depth
        variance = variance + 4.0**-accumulator.bits * (steps**2 / 3 + steps / 2) * squares
        if accumulator.promote:
            variance = variance + 4.0**-24 * (n / promote) ** 2 / 3 * squares
    return variance


def expect(inputs: Inputs, plan: RoundingPlan, device: torch.device | None = None) -> Expected:
    """Return the expected output of one call for a backend that follows `plan`.

    Computed on `device` (default: the CPU).
    """
    experts = oracle_experts(inputs.layer, device)
    place = device or torch.device("cpu")
    x = decode(inputs.hidden_states.to(place))
    weights = inputs.topk_weights.to(place, torch.float64)
    rounding = Rounding(plan, inputs.case.problem.dtype, repeat=experts.quantized_by(plan) is not None)
    return propagate(forward(x, weights, inputs.topk_ids.to(place), experts, rounding), experts, rounding)


def propagate(values: Values, experts: Experts, rounding: Rounding) -> Expected:
    """Return the output of `forward` with its deviation."""
    zero = values.out.new_zeros(())
    spread = Spread(zero, zero, zero, zero)
    for stage in STAGES:
        spread = stage(values, experts, rounding, spread)
    tie_sigma = torch.zeros_like(values.out) if spread.ties is None else spread.ties.sqrt()
    return Expected(
        rounding.plan, rounding.repeat, values.out, spread.variance, spread.variance_without_flips, spread.max_flip,
        spread.flips, tie_sigma, values.expert, values.token, rounding.plan.accumulator.bits is None,
    )  # fmt: skip


# -- the stages of reference/moe.py: each returns the error of its output from that of its input ----------------------
def quantize_input(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    """Set ties: the variance of x [R, K] from codes that the division of amax, a reciprocal or a division may tip.

    Their distance to the tie is known, so this is no average: within 4 u of it either code is right (+- half a step),
    elsewhere neither rounding may differ.
    """
    scheme, ratio, scale = experts.quantized_by(rounding.plan), values.x_ratio, values.x_scale
    if scheme is None or ratio is None or scale is None:
        return spread
    near = near_tie(ratio, scheme)
    if not near.any():
        return spread
    step = code_step(ratio, scheme) * scale
    return replace(spread, ties=torch.where(near, step**2, 0.0))


def gemm_1(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    """Add the errors of GEMM 1, its scales, its bias and the router weight on input; x has no error but for ties."""
    plan, h = rounding.plan, values.h
    ties = [] if spread.ties is None else [spread.ties[values.row]]
    squares, *ties = _through(values, experts.w13, values.x[values.row] ** 2, *ties)
    quantized = experts.quantized_by(plan) is not None
    operations = 4 * quantized + (experts.w13_bias is not None) + experts.router_weight_on_input
    v = summation(values.x.shape[1], squares, h, plan.accumulator)
    v = v + FLOAT32_OP * operations * h**2
    return Spread(v, v, v.new_zeros(len(v)), torch.zeros_like(v), *ties).stored(h, plan.gate_up, rounding)


def activate(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    """Pass the error through a = activation(h) by its slopes; `ties` by the slopes over its own deviation."""
    spread = (_gated if is_gated(experts.activation) else _ungated)(values, experts, rounding, spread)
    return spread.stored(values.a, rounding.plan.act, rounding)


def quantize_activation(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    """Add the roundings to codes and to tf32."""
    scheme, ratio, scale = experts.quantized_by(rounding.plan), values.a_ratio, values.a_scale
    if scheme is not None and ratio is not None and scale is not None:
        spread = spread.plus(4 * FLOAT32_OP * values.a**2)
        # Where both sides saturate nothing differs.
        step = torch.where(saturates(ratio, scheme), 0.0, code_step(ratio, scheme) * scale)
        spread = spread.rounded(values.a, step, rounding.repeat)
        if rounding.repeat:
            spread = spread.round_either_way(step, near_tie(ratio, scheme))
    if rounding.plan.tf32:  # the oracle cuts its own `a`; a kernel that cuts a neighbour of it differs by a step
        spread = spread.rounded(values.a, _ulp(values.a, "tf32"), repeat=False)
    return spread


def gemm_2(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    """Pass the error through w2; add the errors of GEMM 2, its scales, its bias and the router weight."""
    plan, y, repeat = rounding.plan, values.y, rounding.repeat
    ties = [] if spread.ties is None else [spread.ties]
    without_flips = [spread.variance_without_flips] if repeat else []  # otherwise nothing flips: it is the variance
    squares, variance, *more = _through(values, experts.w2, values.operand**2, spread.variance, *without_flips, *ties)
    noise = summation(values.operand.shape[1], squares, y, plan.accumulator)
    noise = (
        noise + FLOAT32_OP * (4 * (experts.quantized_by(plan) is not None) + 1 + (experts.w2_bias is not None)) * y**2
    )
    max_flip = torch.zeros_like(y)
    if repeat:
        max_flip = _through(values, experts.w2, spread.max_flip**8, power=8)[0] ** 0.125
    without, *ties = more if repeat else [variance, *more]
    return Spread(variance, without, spread.flips, max_flip, *ties).plus(noise)


def weigh(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    """Multiply by the router weight; add the roundings of the slots."""
    plan, weight = rounding.plan, values.weight[:, None]
    if plan.weight == "before_store":
        return spread.times(weight).stored(values.y * weight, plan.slot, rounding)
    spread = spread.stored(values.y, plan.slot, rounding).times(weight)
    return spread.stored(values.y * weight, "io", rounding) if plan.weight == "rounded" else spread


def combine(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    """Sum over the slots of a token, [P, K] -> [T, K]; add the errors of the sum and of the final store."""
    out, token, io = values.out, values.token, rounding.io
    # Slots of one token with the same expert make the same errors: they add up as deviations, not as variances.
    repeats = _share_of_repeats(values)[:, None]
    max_flip = spread.max_flip * repeats

    def by_token(value: Tensor) -> Tensor:
        return torch.zeros_like(out).index_add_(0, token, value)

    power = by_token((values.y * values.weight[:, None]) ** 2)
    flips = out.new_zeros(len(out)).index_add_(0, token, spread.flips)
    max_flip = torch.zeros_like(out).scatter_reduce_(
        0, token[:, None].expand_as(max_flip), max_flip, "amax", include_self=True
    )
    spread = replace(spread.map(lambda v: by_token(v * repeats)), flips=flips, max_flip=max_flip)
    slots = values.topk_ids.shape[1] + experts.shared
    final = FLOAT32_OP * slots * power
    if rounding.plan.combine == "io":
        final = final + slots * _ulp(torch.maximum(out.abs(), power.sqrt()), io) ** 2 / 12
    # The oracle never rounds the final store.
    return spread.plus(final + _ulp(out, io, spread.variance + final) ** 2 / 12)


#: The error of every stage of reference.moe.PIPELINE, in its order. `assign` makes none.
STAGES = (quantize_input, gemm_1, activate, quantize_activation, gemm_2, weigh, combine)


def _through(values: Values, weights: Any, *variances: Tensor, power: int = 2) -> list[Tensor]:
    """Return each variance [P, n] times the weights of its expert to this power: [P, N].

    To decode a large layer takes long: one call for all of them.
    """
    out = [v.new_zeros(len(v), weights.shape[1]) for v in variances]
    for e, mine in values.groups:
        factor = (weights[e].abs() ** power).T
        for result, v in zip(out, variances):
            result[mine] = v[mine] @ factor
    return out


def _ungated(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    def function(h: Tensor) -> Tensor:
        return combine_gate_up(h, None, experts.activation)

    ties = spread.ties
    if ties is not None:
        ties = ties * _slope(function, values.h, ties) ** 2
    spread = spread.times(_slope(function, values.h, spread.variance))
    return replace(spread.plus((EPS_ACT**2 + 4 * FLOAT32_OP) * values.a**2), ties=ties)


def _gated(values: Values, experts: Experts, rounding: Rounding, spread: Spread) -> Spread:
    def halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
        of_gate, of_up = split_gate_up(tensor, experts.activation)
        assert of_up is not None
        return of_gate, of_up

    g, u = halves(values.h)
    act, factor = activated_gate(g, experts), up_factor(u, experts)

    def slopes(variance: Tensor) -> tuple[Tensor, Tensor]:
        of_g, of_u = halves(variance)
        return _slope(lambda t: activated_gate(t, experts), g, of_g), _slope(lambda t: up_factor(t, experts), u, of_u)

    parts = [halves(t) for t in (spread.variance, spread.variance_without_flips, spread.max_flip)]
    (gate, up) = (Spread(v, without, spread.flips, flip) for v, without, flip in zip(*parts))
    slope_g, slope_u = slopes(spread.variance)
    gate = gate.times(slope_g).plus((EPS_ACT**2 + 4 * FLOAT32_OP) * act**2)
    if rounding.plan.act_chain:
        gate = gate.stored(act, "io", rounding)
    gate, up = gate.times(factor), up.times(slope_u * act)
    ties = spread.ties
    if ties is not None:
        slope_g, slope_u = slopes(ties)
        of_g, of_u = halves(ties)
        ties = of_g * (slope_g * factor) ** 2 + of_u * (slope_u * act) ** 2
    return Spread(
        gate.variance + up.variance, gate.variance_without_flips + up.variance_without_flips, gate.flips,
        torch.maximum(gate.max_flip, up.max_flip), ties,
    ).plus(FLOAT32_OP * values.a**2)  # fmt: skip


def _share_of_repeats(values: Values) -> Tensor:
    """Return (sum of the weights of all pairs of this token and expert) / (the pair's own): [P], 1 without repeats."""
    token, expert, weight = values.token, values.expert, values.weight
    pair = token * (int(expert.max()) + 1 if len(expert) else 1) + expert
    _, group = pair.unique(return_inverse=True)
    total = weight.new_zeros(len(pair)).index_add_(0, group, weight.abs())[group]
    return torch.where(weight != 0, total / weight.abs().clamp(min=1e-300), 1.0)


def _slope(function: Callable[[Tensor], Tensor], at: Tensor, variance: Tensor) -> Tensor:
    """Return |derivative|, or the steepest secant to two deviations away.

    Near a clamp, or where the deviation is larger than the bend of the activation, the derivative alone is too small.
    """
    with torch.enable_grad():
        at = at.detach().clone().requires_grad_(True)
        value = function(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    slope, value, reach = slope.abs(), value.detach(), 2 * variance.sqrt()
    for side in (at.detach() + reach, at.detach() - reach):
        secant = (function(side) - value).abs() / reach
        slope = torch.where(reach > 0, torch.fmax(slope, secant), slope)
    return slope
