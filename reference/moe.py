"""The Mixture-of-Experts layer in float64, as a pipeline of stages. This is the oracle.

`naive.py` defines the layer; the stages compute the same values. They expose every value on the way, and they repeat
the roundings that a backend declares (`Rounding`; the default repeats none):

    assign               which local expert serves which (token, slot) pair, with which weight
    quantize_input       x = hidden_states (times the router weight, if applied on input), quantized
    gemm_1               h = x @ w13[expert].T + w13_bias[expert]
    activate             a = activation(h)
    quantize_activation  operand = a, quantized
    gemm_2               y = operand @ w2[expert].T + w2_bias[expert]
    weigh                slots = y * weight
    combine              out = sum of the slots of a token

A slot is valid if its id lies in [0, num_experts) and expert_map does not send it to -1; other slots add nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reference import quant
from reference.activation import combine_gate_up, split_gate_up
from reference.formats import round_to, truncate_to
from reference.plan import RoundingPlan
from reference.scheme import Scheme

_UNSET: Any = None


@dataclass
class Experts:
    """The layer's weights, in float64.

    w13 [E, 2I, K] (ungated activations: [E, I, K]) and w2 [E, K, I] need only `len`, `shape` and indexing by one local
    expert, so that a layer too large for float64 can be decoded one expert at a time. Biases [E, 2I] and [E, K] are
    added after the scales. expert_map [E_global] gives the local expert or -1. shared is the number of shared experts:
    they come after the routed ones in w13 and w2, serve every token, and have weight 1.
    activation_quant is the scheme of quantized activations (reference/scheme.py), or None; a13_scale and a2_scale are
    its static scales, or None if they are dynamic.
    """

    w13: Any
    w2: Any
    activation: str = "silu"
    limit: float | None = None
    alpha: float = 1.702
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    expert_map: Tensor | None = None
    num_experts: int | None = None  #: global number of routed experts; default: len(expert_map) or len(w13) - shared
    router_weight_on_input: bool = False
    shared: int = 0
    activation_quant: Scheme | None = None
    a13_scale: float | None = None
    a2_scale: float | None = None

    def global_experts(self) -> int:
        """Return the number of routed experts of all ranks."""
        if self.num_experts is not None:
            return self.num_experts
        return len(self.expert_map) if self.expert_map is not None else len(self.w13) - self.shared

    def quantized_by(self, plan: RoundingPlan) -> Scheme | None:
        """Return the scheme of the operands of both GEMMs under this plan, None if they are not quantized."""
        return self.activation_quant if plan.quantizes_activations else None


@dataclass(frozen=True)
class Rounding:
    """The declared roundings that the oracle repeats.

    Roundings of inputs are exactly repeatable and always repeated; those of computed values (storage, requantization)
    only if `repeat` (harness/oracle/deviation.py).
    """

    plan: RoundingPlan = RoundingPlan()
    io: str = "fp32"
    repeat: bool = False

    def store(self, value: Tensor, where: str) -> Tensor:
        """Round a computed value to the format in which it is stored: "io" or "fp32"."""
        return round_to(value, self.io) if self.repeat and where == "io" else value

    def operand(self, value: Tensor) -> Tensor:
        """Round an operand of a product to tf32 if the plan does."""
        if self.plan.tf32 == "truncated":
            return truncate_to(value, "tf32")
        return round_to(value, "tf32") if self.plan.tf32 else value

    def weights(self, value: Tensor) -> Tensor:
        """Round one expert's weights, times their scales, as the plan does."""
        return self.operand(round_to(value, self.io) if self.plan.weights == "io" else value)

    def router_weight(self, weight: Tensor) -> Tensor:
        """Round the router weights as the plan does."""
        return round_to(weight, self.io) if self.plan.router_weight == "io" else weight

    def weighted_input(self, value: Tensor) -> Tensor:
        """Round hidden_states times the router weight as the plan does."""
        return round_to(value, self.io) if self.plan.weighted_input == "io" else value


@dataclass(frozen=True)
class Values:
    """The values of one call, float64 unless noted; a stage sets its own. P counts the valid (token, slot) pairs."""

    hidden_states: Tensor  #: [T, K]
    topk_weights: Tensor  #: [T, k]
    topk_ids: Tensor  #: [T, k] integers
    token: Tensor = _UNSET  #: [P] int64
    slot: Tensor = _UNSET  #: [P] int64, top_k + s for shared expert s
    expert: Tensor = _UNSET  #: [P] int64, local
    groups: list[tuple[int, Tensor]] = _UNSET  #: (local expert, its positions in [P]) of every expert with a pair
    weight: Tensor = _UNSET  #: [P] the factor of y: 1 if the router weight is applied on input
    row: Tensor = _UNSET  #: [P] int64, the row of x that the pair reads
    x: Tensor = _UNSET  #: [R, K] GEMM 1's operand, dequantized if it was quantized; for R see `input_rows`
    x_ratio: Tensor | None = None  #: [R, K] x / scale before it was rounded to a code; None if x is not quantized
    x_scale: Tensor | None = None  #: [R, K]
    h: Tensor = _UNSET  #: [P, 2I], or [P, I] if ungated
    a: Tensor = _UNSET  #: [P, I] before it is quantized
    a_ratio: Tensor | None = None  #: [P, I] likewise for a
    a_scale: Tensor | None = None  #: [P, I]
    operand: Tensor = _UNSET  #: [P, I] GEMM 2's operand, dequantized if it was quantized
    y: Tensor = _UNSET  #: [P, K]
    slots: Tensor = _UNSET  #: [P, K]
    out: Tensor = _UNSET  #: [T, K]


Stage = Callable[[Values, Experts, Rounding], Values]


def local_experts(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """Return the local expert of every slot, -1 where the slot is not served here: [T, k] int64."""
    ids = topk_ids.long()
    valid = (ids >= 0) & (ids < num_experts)
    if expert_map is None:
        return torch.where(valid, ids, -1)
    return torch.where(valid, expert_map.long()[ids.clamp(0, num_experts - 1)], -1)


def assign(values: Values, experts: Experts, rounding: Rounding) -> Values:
    """Set token, slot, expert, groups and weight. ValueError for a router weight on input with top_k > 1."""
    local = local_experts(values.topk_ids, experts.global_experts(), experts.expert_map)
    weights = rounding.router_weight(values.topk_weights)
    if experts.shared:
        first = len(experts.w13) - experts.shared
        always = torch.arange(first, first + experts.shared, device=local.device).expand(len(local), -1)
        local = torch.cat([local, always], 1)
        weights = torch.cat([weights, torch.ones_like(always, dtype=weights.dtype)], 1)
    token, slot = torch.nonzero(local >= 0, as_tuple=True)
    expert, weight = local[token, slot], weights[token, slot]
    if experts.router_weight_on_input:
        top_k = values.topk_ids.shape[1]
        if top_k != 1:
            raise ValueError(f"router_weight_on_input: top_k={top_k}; only top_k=1 has a meaning")
        weight = torch.ones_like(weight)
    numbers, counts = expert.unique(return_counts=True)
    groups = list(zip(numbers.tolist(), expert.argsort(stable=True).split(counts.tolist())))
    return replace(values, token=token, slot=slot, expert=expert, groups=groups, weight=weight)


def input_rows(values: Values, experts: Experts, rounding: Rounding) -> Tensor:
    """Return the rows [R, K] of GEMM 1's operand before they are quantized.

    R is T, a row for every token; 2T if shared experts read the plain input where routed ones read a weighted one
    (Llama-4). The plain rows are the second half.
    """
    if not experts.router_weight_on_input:
        return values.hidden_states
    weights = rounding.router_weight(values.topk_weights)
    x = rounding.weighted_input(values.hidden_states * weights)
    return torch.cat([x, values.hidden_states]) if experts.shared else x


def quantize_input(values: Values, experts: Experts, rounding: Rounding) -> Values:
    """Set row, x, x_ratio and x_scale. ValueError for weighted_input="product" with shared experts."""
    on_input, row = experts.router_weight_on_input, values.token
    on_product = on_input and rounding.plan.weighted_input == "product"
    if on_input and experts.shared:
        if on_product:
            raise ValueError("weighted_input='product' has no meaning with shared experts, whose input is not weighted")
        routed = values.slot < values.topk_ids.shape[1]
        row = torch.where(routed, values.token, values.token + len(values.hidden_states))
    x = values.hidden_states if on_product else input_rows(values, experts, rounding)
    ratio = scale = None
    if scheme := experts.quantized_by(rounding.plan):
        ratio, scale = quant.quantize_activation(x, scheme, experts.a13_scale, rounded=False)
        # The input's codes are repeatable, but for ties (harness/oracle/deviation.py): they are always rounded.
        x = quant.saturated(ratio, scheme) * scale
    x = rounding.operand(x)
    if on_product:
        weights = rounding.router_weight(values.topk_weights)
        x = x * weights
        scale = None if scale is None else scale * weights
    return replace(values, row=row, x=x, x_ratio=ratio, x_scale=scale)


def gemm_1(values: Values, experts: Experts, rounding: Rounding) -> Values:
    """Set h."""
    h = _linear(values, values.x[values.row], experts.w13, experts.w13_bias, rounding)
    return replace(values, h=rounding.store(h, rounding.plan.gate_up))


def activate(values: Values, experts: Experts, rounding: Rounding) -> Values:
    """Set a."""
    gate, up = split_gate_up(values.h, experts.activation)
    if rounding.plan.act_chain and up is not None:
        a = rounding.store(activated_gate(gate, experts), "io") * up_factor(up, experts)
    else:
        a = combine_gate_up(gate, up, experts.activation, experts.limit, experts.alpha)
    return replace(values, a=rounding.store(a, rounding.plan.act))


def quantize_activation(values: Values, experts: Experts, rounding: Rounding) -> Values:
    """Set operand, a_ratio and a_scale."""
    scheme = experts.quantized_by(rounding.plan)
    if scheme is None:
        return replace(values, operand=rounding.operand(values.a))
    ratio, scale = quant.quantize_activation(values.a, scheme, experts.a2_scale, rounded=False)
    operand = (quant.saturated(ratio, scheme) if rounding.repeat else ratio) * scale
    return replace(values, operand=rounding.operand(operand), a_ratio=ratio, a_scale=scale)


def gemm_2(values: Values, experts: Experts, rounding: Rounding) -> Values:
    """Set y."""
    return replace(values, y=_linear(values, values.operand, experts.w2, experts.w2_bias, rounding))


def weigh(values: Values, experts: Experts, rounding: Rounding) -> Values:
    """Set slots."""
    plan, weight = rounding.plan, values.weight[:, None]
    if plan.weight == "before_store":
        return replace(values, slots=rounding.store(values.y * weight, plan.slot))
    slots = rounding.store(values.y, plan.slot) * weight
    return replace(values, slots=rounding.store(slots, "io") if plan.weight == "rounded" else slots)


def combine(values: Values, experts: Experts, rounding: Rounding) -> Values:
    """Set out: the slots of a token are added in their order."""
    return replace(values, out=torch.zeros_like(values.hidden_states).index_add_(0, values.token, values.slots))


PIPELINE: tuple[Stage, ...] = (
    assign, quantize_input, gemm_1, activate, quantize_activation, gemm_2, weigh, combine,
)  # fmt: skip
_NAMES = [stage.__name__ for stage in PIPELINE]


def forward(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts, rounding: Rounding = Rounding()
) -> Values:
    """Return all values of the layer.

    hidden_states [T, K] float64, topk_weights [T, k] float64, topk_ids [T, k] integers.
    """
    values = Values(hidden_states, topk_weights, topk_ids)
    for stage in PIPELINE:
        values = stage(values, experts, rounding)
    return values


def resume(values: Values, experts: Experts, rounding: Rounding, after: str) -> Values:
    """Return the values that follow from those of the stage of this name, a function of PIPELINE."""
    for stage in PIPELINE[_NAMES.index(after) + 1 :]:
        values = stage(values, experts, rounding)
    return values


def moe(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts, rounding: Rounding = Rounding()
) -> Tensor:
    """Return the layer's output [T, K], float64."""
    return forward(hidden_states, topk_weights, topk_ids, experts, rounding).out


def _linear(values: Values, rows: Tensor, weights: Any, bias: Tensor | None, rounding: Rounding) -> Tensor:
    """Return rows [P, K] @ weights[e].T + bias[e] with the local expert e of each row: [P, N].

    weights [E, N, K], bias [E, N]. The rows of one expert are multiplied at once, in their order.
    """
    out = rows.new_zeros(len(rows), weights.shape[1])
    for e, mine in values.groups:
        out[mine] = rows[mine] @ rounding.weights(weights[e]).T
    return out if bias is None else out + bias[values.expert]


def activated_gate(gate: Tensor, experts: Experts) -> Tensor:
    """Return act(gate) alone, after the clamp: [.., I] -> [.., I]."""
    one = torch.zeros_like(gate) if experts.activation == "swigluoai" else torch.ones_like(gate)
    gate = torch.minimum(gate, gate.new_tensor(_limit(experts)))
    return combine_gate_up(gate, one, experts.activation, float("inf"), experts.alpha)


def up_factor(up: Tensor, experts: Experts) -> Tensor:
    """Return the factor of act(gate): up, clamped, plus one for swigluoai."""
    up = up.clamp(-_limit(experts), _limit(experts))
    return up + 1 if experts.activation == "swigluoai" else up


def _limit(experts: Experts) -> float:
    if experts.limit is not None:
        return experts.limit
    return 7.0 if experts.activation == "swigluoai" else float("inf")
