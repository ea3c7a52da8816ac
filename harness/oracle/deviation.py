"""The oracle's output and, per element, the variance of a correct kernel's difference from it.

Every rounding of the backend's plan is an independent error, propagated to the output to second moments. Two modes:

U  the oracle leaves computed values unrounded, and every declared rounding of step s adds s^2/12. One-sided: a kernel
   finer than its plan passes. Gates bf16, fp16, fp32 and weight-only fp8.
F  the oracle repeats the declared roundings; what is left are flips, where a value near a tie rounds the other way.
   Tight enough to see through fp8, but a wrong plan accuses correct kernels. Gates quantized activations.

Formulas (u = 2^-24, mean square of one float32 rounding error u^2/6 of the value's square):
a sum of n products: u^2/6 (n/2 sum of squares + n/3 value^2), the second-moment form of the probabilistic bound of
Higham & Mary 2019 (SISC 41(5) A2815); a tensor core that truncates to t bits in depth-m steps, promoted every q:
4^-t (s^2/3 + s/2) sum of squares with s = min(n, q)/m; a flip: s^2 min(0.798 sd/s, 1/6), the mean over positions of
the tie of a normal error of deviation sd.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from harness.inputs.draw import Inputs
from harness.oracle.experts import oracle_experts
from reference.activation import combine_gate_up, is_gated, split_gate_up
from reference.formats import decode, fmt, ulp
from reference.moe import Experts, Rounding, Stages, activated_gate, forward, up_factor
from reference.plan import Accumulator, RoundingPlan

U32 = 2.0**-24
EPS_ACT = 2.0**-22  #: relative error of a device's exp, erf or tanh
FLOAT32_OP = U32**2 / 6


@dataclass
class Expected:
    """The oracle's answer for one call under one plan."""

    plan: RoundingPlan
    mode: str  #: "U" or "F"
    out: Tensor  #: [T, K] float64, the final store not rounded
    variance: Tensor  #: [T, K]
    smooth: Tensor  #: [T, K] the variance without flips (mode F; mode U: the same as `variance`)
    jump: Tensor  #: [T, K] the largest change that one flip makes (mode F; mode U: zero)
    flips: Tensor  #: [T] predicted number of flips that touch the row (mode F)
    either: Tensor  #: [T, K] deviation from input codes so near a tie that either choice is right
    topk_experts: Tensor  #: [P] and [P]: which token met which local expert
    topk_tokens: Tensor
    rne_accumulator: bool


@dataclass
class Spread:
    """Second moments of an error, value by value."""

    total: Tensor
    smooth: Tensor
    flips: Tensor  #: per row
    step: Tensor  #: the largest single jump

    def map(self, change: Callable[[Tensor], Tensor]) -> Spread:
        return Spread(change(self.total), change(self.smooth), self.flips, self.step)

    def plus(self, variance: Tensor) -> Spread:
        return self.map(lambda v: v + variance)

    def times(self, factor: Tensor) -> Spread:
        scaled = self.map(lambda v: v * factor**2)
        return replace(scaled, step=self.step * factor.abs())

    def store(self, value: Tensor, step: Tensor, repeat: bool) -> Spread:
        """After a rounding of this step to storage: step^2/12 in mode U, the mean over flips in mode F."""
        step = torch.where(torch.isfinite(value), step, 0.0)
        if not repeat:
            return self.plus(step**2 / 12)
        positive = step > 0
        probability = torch.where(
            positive, (0.798 * self.total.sqrt() / torch.where(positive, step, 1.0)).clamp(max=1 / 6), 0.0
        )
        return Spread(
            self.total + step**2 * probability,
            self.smooth,
            self.flips + torch.nan_to_num(probability).sum(1),
            torch.maximum(self.step, torch.where(probability > 0, step, 0.0)),
        )

    def tossed(self, step: Tensor, where: Tensor) -> Spread:
        """After a rounding that goes either way at these places: by a step, every other time."""
        jump = torch.where(where, step, 0.0)
        return Spread(
            self.total + jump**2 / 2, self.smooth, self.flips + where.sum(1) / 2, torch.maximum(self.step, jump)
        )


def _ulp(value: Tensor, form: str, spread: Tensor | None = None) -> Tensor:
    """The step at |value|, or at |value| + sigma where the value may be smaller than its own error."""
    magnitude = value.abs() if spread is None else value.abs() + spread.sqrt()
    return ulp(torch.nan_to_num(magnitude, posinf=fmt(form).max).clamp(max=fmt(form).max), form)


def summation(n: int, squares: Tensor, value: Tensor, accumulator: Accumulator) -> Tensor:
    """Variance of a sum of n products whose squares sum to `squares`."""
    variance = FLOAT32_OP * (n / 2 * squares + n / 3 * value**2)
    if accumulator.bits is not None:
        promote = accumulator.promote or n
        steps = min(n, promote) / accumulator.depth
        variance = variance + 4.0**-accumulator.bits * (steps**2 / 3 + steps / 2) * squares
        if accumulator.promote:
            variance = variance + 4.0**-24 * (n / promote) ** 2 / 3 * squares
    return variance


def expect(inputs: Inputs, plan: RoundingPlan, device: torch.device | None = None) -> Expected:
    """The expected output of one call for a backend that follows `plan`; computed on `device` (default: the CPU)."""
    problem = inputs.case.problem
    experts = oracle_experts(inputs.layer, device)
    place = device or torch.device("cpu")
    x = decode(inputs.hidden_states.to(place))
    weights = inputs.topk_weights.to(place, torch.float64)
    quantized = bool(experts.activation_quant) and plan.quantizes_activations
    rounding = Rounding(plan, problem.dtype, repeat=quantized)
    stages = forward(x, weights, inputs.topk_ids.to(place), experts, rounding)
    return propagate(stages, experts, rounding, problem.top_k + problem.shared_experts)


def propagate(stages: Stages, experts: Experts, rounding: Rounding, slots: int) -> Expected:
    """The deviation of every output, from the stages that `forward` went through."""
    plan, io, repeat = rounding.plan, rounding.io, rounding.repeat
    quantized = stages.x_ratio is not None
    rows = stages.rows_by_expert()

    def through(weights, *spreads: Tensor, power: int = 2) -> list[Tensor]:
        """Each spread [P, n] times the weights to this power. Decoding a large layer costs: once for all of them."""
        width = weights[0].shape[0]
        out = [spread.new_zeros(len(spread), width) for spread in spreads]
        for e, mine in rows:
            factor = (weights[e].abs() ** power).T
            for result, spread in zip(out, spreads):
                result[mine] = spread[mine] @ factor
        return out

    # GEMM 1, its scales, bias and weight on input
    hidden = stages.x.shape[1]
    (squares,) = through(experts.w13, stages.x[stages.row] ** 2)
    v = summation(hidden, squares, stages.h, plan.accumulator)
    extra_ops = 4 * quantized + (experts.w13_bias is not None) + experts.router_weight_on_input
    v = v + FLOAT32_OP * extra_ops * stages.h**2
    spread = Spread(v, v, v.new_zeros(len(v)), torch.zeros_like(v))
    either = _input_ties(stages, through, experts) if quantized else None
    if plan.gate_up == "io":
        spread = spread.store(stages.h, _ulp(stages.h, io, spread.total), repeat)
    spread, either = _activation(stages, experts, rounding, spread, either)
    if plan.act == "io":
        spread = spread.store(stages.a, _ulp(stages.a, io, spread.total), repeat)
    if quantized:
        assert stages.a_ratio is not None and stages.a_scale is not None
        spread = spread.plus(4 * FLOAT32_OP * stages.a**2)
        step = _ulp(stages.a_ratio.abs().clamp(max=447.9), "e4m3") * stages.a_scale
        # Beyond 464 both sides saturate and nothing differs.
        step = torch.where(stages.a_ratio.abs() > 464, 0.0, step)
        spread = spread.store(stages.a, step, repeat)
        if repeat:
            spread = spread.tossed(step, _near_tie(stages.a_ratio))

    if plan.tf32:  # the oracle cuts its own `a`: where another cuts a neighbour of it, they are a step apart
        spread = spread.store(stages.a, _ulp(stages.a, "tf32"), repeat=False)

    # GEMM 2, the router weight, the slot's store
    inter = stages.operand.shape[1]
    ties = [either] if either is not None else []
    smooth = [spread.smooth] if repeat else []  # in mode U nothing flips: it is the total
    squares, total, *more = through(experts.w2, stages.operand**2, spread.total, *ties, *smooth)
    either = more[0] if ties else None
    noise = summation(inter, squares, stages.y, plan.accumulator)
    noise = noise + FLOAT32_OP * (4 * quantized + 1 + (experts.w2_bias is not None)) * stages.y**2
    jump = through(experts.w2, spread.step**8, power=8)[0] ** 0.125 if repeat else torch.zeros_like(stages.y)
    spread = Spread(total, more[-1] if repeat else total, spread.flips, jump).plus(noise)
    weight = stages.weight[:, None]
    slot = stages.y
    if plan.weight == "before_store":
        slot, spread = slot * weight, spread.times(weight)
        if plan.slot == "io":
            spread = spread.store(slot, _ulp(slot, io, spread.total), repeat)
    else:
        if plan.slot == "io":
            spread = spread.store(slot, _ulp(slot, io, spread.total), repeat)
        slot, spread = slot * weight, spread.times(weight)
        if plan.weight == "rounded":
            spread = spread.store(slot, _ulp(slot, io, spread.total), repeat)

    # Slots of one token with the same expert make the same errors: they add up as deviations, not as variances.
    repeated = _share_of_repeats(stages)[:, None]
    spread = replace(spread.map(lambda v: v * repeated), step=spread.step * repeated)

    # The sum over top_k, and the final store, which the oracle never rounds
    def by_token(value: Tensor) -> Tensor:
        return torch.zeros_like(stages.out).index_add_(0, stages.token, value)

    power = by_token(slot**2)
    variance, undisturbed = by_token(spread.total), by_token(spread.smooth)
    final = FLOAT32_OP * slots * power
    largest = torch.maximum(stages.out.abs(), power.sqrt())
    if plan.combine == "io":
        final = final + slots * _ulp(largest, io) ** 2 / 12
    final = final + _ulp(stages.out, io, variance + final) ** 2 / 12
    jump = torch.zeros_like(stages.out).scatter_reduce_(
        0, stages.token[:, None].expand_as(slot), spread.step, "amax", include_self=True
    )
    flips = stages.out.new_zeros(len(stages.out)).index_add_(0, stages.token, spread.flips)
    apart = by_token(either * weight**2 * repeated).sqrt() if either is not None else torch.zeros_like(stages.out)
    return Expected(
        plan, "F" if repeat else "U", stages.out, variance + final, undisturbed + final, jump, flips, apart,
        stages.expert, stages.token, plan.accumulator.bits is None,
    )  # fmt: skip


def _activation(
    stages: Stages, experts: Experts, rounding: Rounding, spread: Spread, either: Tensor | None
) -> tuple[Spread, Tensor | None]:
    """The error of a = activation(h), by its derivatives; and the same for the deviation of ties."""
    if not is_gated(experts.activation):

        def alone(h: Tensor) -> Tensor:
            return combine_gate_up(h, None, experts.activation)

        out = spread.times(_slope(alone, stages.h, spread.total)).plus((EPS_ACT**2 + 4 * FLOAT32_OP) * stages.a**2)
        return out, None if either is None else either * _slope(alone, stages.h, either) ** 2
    g, u = split_gate_up(stages.h, experts.activation)

    def parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
        first, second = split_gate_up(tensor, experts.activation)
        assert second is not None
        return first, second

    def slopes(variance: Tensor) -> tuple[Tensor, Tensor]:
        of_g, of_u = parts(variance)
        return _slope(lambda t: activated_gate(t, experts), g, of_g), _slope(lambda t: up_factor(t, experts), u, of_u)

    act, factor = activated_gate(g, experts), up_factor(u, experts)
    totals, smooths, steps = parts(spread.total), parts(spread.smooth), parts(spread.step)
    slope_g, slope_u = slopes(spread.total)
    gate = Spread(totals[0], smooths[0], spread.flips, steps[0]).times(slope_g)
    gate = gate.plus((EPS_ACT**2 + 4 * FLOAT32_OP) * act**2)
    if rounding.plan.act_chain:
        gate = gate.store(act, _ulp(act, rounding.io, gate.total), rounding.repeat)
    scaled, up = gate.times(factor), Spread(totals[1], smooths[1], spread.flips, steps[1]).times(slope_u * act)
    own = FLOAT32_OP * stages.a**2
    out = Spread(
        scaled.total + up.total + own, scaled.smooth + up.smooth + own, gate.flips, torch.maximum(scaled.step, up.step)
    )  # fmt: skip
    if either is not None:
        first, second = parts(either)
        slope_g, slope_u = slopes(either)
        either = first * (slope_g * factor) ** 2 + second * (slope_u * act) ** 2
    return out, either


def _share_of_repeats(stages: Stages) -> Tensor:
    """[P] (sum of the weights of all pairs of this token and expert) / (this pair's weight): 1 without repeats."""
    pair = stages.token * (int(stages.expert.max()) + 1 if len(stages.expert) else 1) + stages.expert
    _, group = pair.unique(return_inverse=True)
    total = stages.weight.new_zeros(len(pair)).index_add_(0, group, stages.weight.abs())[group]
    return torch.where(stages.weight != 0, total / stages.weight.abs().clamp(min=1e-300), 1.0)


def _slope(function: Callable[[Tensor], Tensor], at: Tensor, variance: Tensor) -> Tensor:
    """|derivative|, or the steepest secant to two deviations away: a sum near a clamp, or whose deviation is larger
    than the bend of the activation, may end where the derivative does not tell."""
    with torch.enable_grad():
        at = at.detach().clone().requires_grad_(True)
        value = function(at)
        (slope,) = torch.autograd.grad(value.sum(), at)
    slope, value, reach = slope.abs(), value.detach(), 2 * variance.sqrt()
    for side in (at.detach() + reach, at.detach() - reach):
        secant = (function(side) - value).abs() / reach
        slope = torch.where(reach > 0, torch.fmax(slope, secant), slope)
    return slope


def _input_ties(stages: Stages, through: Callable[..., list[Tensor]], experts: Experts) -> Tensor | None:
    """Variance in h from input codes so near a tie that amax/448, a reciprocal or a division may tip them.

    Their distance to the tie is known, so this is no average: within 4 u of it either code is right (+- half a step),
    elsewhere neither rounding may differ.
    """
    ratio, scale = stages.x_ratio, stages.x_scale
    assert ratio is not None and scale is not None
    near = _near_tie(ratio)
    if not near.any():
        return None
    variance = torch.where(near, (_ulp(ratio.abs().clamp(max=447.9), "e4m3") * scale) ** 2, 0.0)
    return through(experts.w13, variance[stages.row])[0]


def _near_tie(ratio: Tensor) -> Tensor:
    """Where amax/448, a reciprocal or a division may tip the code."""
    inside = ratio.abs().clamp(max=447.9)
    step = _ulp(inside, "e4m3")
    position = inside / step
    near = (position - position.floor() - 0.5).abs() * step <= 8 * U32 * inside
    return near & (ratio.abs() < 464) & torch.isfinite(ratio)
