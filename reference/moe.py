"""The naive Mixture-of-Experts layer: float64, expert by expert. This is the oracle.

For every token t and slot j with a valid expert e = topk_ids[t, j]:

    h = x_t @ w13[e].T + w13_bias[e]        x_t = hidden_states[t] (times its router weight, if applied on input)
    a = activation(h)
    y = a @ w2[e].T + w2_bias[e]
    out_t += topk_weights[t, j] * y         (not weighted again, if the weight was applied on input)

A slot is valid if its id lies in [0, num_experts) and expert_map does not send it to -1; other slots add nothing.
`Rounding` says which of a backend's declared roundings are repeated on the way; the default repeats none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reference.activation import combine_gate_up, is_gated, split_gate_up
from reference.formats import round_to, truncate_to
from reference.plan import RoundingPlan
from reference.quant import quantize_activation


@dataclass
class Experts:
    """The layer's weights, in float64.

    w13 [E, 2I, K] (ungated activations: [E, I, K]) and w2 [E, K, I] need only support indexing by one local expert, so
    that a layer too large for float64 can be decoded one expert at a time. Biases [E, 2I] and [E, K] are added after
    the scales. expert_map [E_global] gives the local expert or -1. shared is the number of shared experts: they stand
    behind the routed ones in w13 and w2, see every token, and have weight 1.
    activation_quant is None, "tensor", "token" or "group" (reference.quant), with static per-tensor scales or None.
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
    activation_quant: str | None = None
    a13_scale: float | None = None
    a2_scale: float | None = None

    def global_experts(self) -> int:
        if self.num_experts is not None:
            return self.num_experts
        return len(self.expert_map) if self.expert_map is not None else len(self.w13) - self.shared


@dataclass(frozen=True)
class Rounding:
    """Which declared roundings the oracle repeats. Roundings of inputs are exactly repeatable and always repeated;
    those of computed values (storage, requantization) only if `repeat`: mode F. Without it: mode U (see expected)."""

    plan: RoundingPlan = RoundingPlan()
    io: str = "fp32"
    repeat: bool = False

    def store(self, value: Tensor, where: str) -> Tensor:
        return round_to(value, self.io) if self.repeat and where == "io" else value

    def operand(self, value: Tensor) -> Tensor:
        if self.plan.tf32 == "truncated":
            return truncate_to(value, "tf32")
        return round_to(value, "tf32") if self.plan.tf32 else value

    def weights(self, value: Tensor) -> Tensor:
        return self.operand(round_to(value, self.io) if self.plan.weights == "io" else value)

    def router_weight(self, weight: Tensor) -> Tensor:
        return round_to(weight, self.io) if self.plan.router_weight == "io" else weight

    def weighted_input(self, value: Tensor) -> Tensor:
        return round_to(value, self.io) if self.plan.weighted_input == "io" else value


@dataclass
class Stages:
    """Every intermediate value, one row per valid (token, slot) pair, P pairs in all; `out` [T, K] is the result."""

    token: Tensor  #: [P] int64
    slot: Tensor  #: [P] int64, top_k + s for shared expert s
    expert: Tensor  #: [P] int64, local
    weight: Tensor  #: [P] what multiplies y: 1 if the router weight was applied on input
    row: Tensor  #: [P] the row of x that the pair reads
    x: Tensor  #: [R, K] GEMM 1's operand, dequantized if it was quantized: a row for every token, and a second one for
    #: shared experts where the others see a weighted input
    h: Tensor  #: [P, 2I]
    act_gate: Tensor  #: [P, I] act(gate), meaningful for gated activations
    a: Tensor  #: [P, I] before requantization
    operand: Tensor  #: [P, I] GEMM 2's operand
    y: Tensor  #: [P, K]
    out: Tensor  #: [T, K]
    x_ratio: Tensor | None = None  #: [R, K] x / scale before it was rounded to e4m3, and the scale
    x_scale: Tensor | None = None
    a_ratio: Tensor | None = None  #: [P, I] likewise for a
    a_scale: Tensor | None = None

    def rows_by_expert(self) -> list[tuple[int, Tensor]]:
        """(local expert, rows of the pair arrays) for every expert that got a token."""
        return [(int(e), torch.nonzero(self.expert == e).flatten()) for e in self.expert.unique()]


def local_experts(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """Local expert of every slot, -1 where the slot is not served here: [T, k] int64."""
    ids = topk_ids.long()
    valid = (ids >= 0) & (ids < num_experts)
    if expert_map is None:
        return torch.where(valid, ids, -1)
    return torch.where(valid, expert_map.long()[ids.clamp(0, num_experts - 1)], -1)


def _by_expert(stages_expert: Tensor, rows: Tensor, width: int, linear: Callable[[int, Tensor], Tensor]) -> Tensor:
    out = rows.new_zeros(len(rows), width)
    for e in stages_expert.unique():
        mine = torch.nonzero(stages_expert == e).flatten()
        out[mine] = linear(int(e), rows[mine])
    return out


def forward(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts, rounding: Rounding = Rounding()
) -> Stages:
    """The whole layer with all its intermediate values.

    hidden_states [T, K] float64, topk_weights [T, k] float64, topk_ids [T, k] integers.
    """
    plan = rounding.plan
    local = local_experts(topk_ids, experts.global_experts(), experts.expert_map)
    weights = rounding.router_weight(topk_weights)
    if experts.shared:
        first = len(experts.w13) - experts.shared
        always = torch.arange(first, first + experts.shared, device=local.device).expand(len(local), -1)
        local = torch.cat([local, always], 1)
        weights = torch.cat([weights, torch.ones_like(always, dtype=weights.dtype)], 1)
    token, slot = torch.nonzero(local >= 0, as_tuple=True)
    expert, weight = local[token, slot], weights[token, slot]

    x, row, on_product = hidden_states, token, False
    if experts.router_weight_on_input:
        if topk_ids.shape[1] != 1:
            raise ValueError(f"router_weight_on_input: top_k={topk_ids.shape[1]}; only top_k=1 has a meaning")
        on_product = plan.weighted_input == "product"
        x = x if on_product else rounding.weighted_input(x * weights[:, :1])
        weight = torch.ones_like(weight)
        if experts.shared and on_product:
            raise ValueError("weighted_input='product' has no meaning with shared experts, whose input is not weighted")
        if experts.shared:  # Llama-4: the shared expert's input is not weighted
            x = torch.cat([x, hidden_states])
            row = torch.where(slot >= topk_ids.shape[1], token + len(hidden_states), token)
    quantized = experts.activation_quant if plan.quantizes_activations else None
    x_ratio = x_scale = a_ratio = a_scale = None
    if quantized:
        x_ratio, x_scale = quantize_activation(x, quantized, experts.a13_scale, rounded=False)
        # The input's codes are repeatable, but for ties (expected.py): they are rounded in both modes.
        x = round_to(x_ratio, "e4m3") * x_scale
    x = rounding.operand(x)
    if on_product:
        x = x * weights[:, :1]
        x_scale = None if x_scale is None else x_scale * weights[:, :1]

    def linear1(e: int, rows: Tensor) -> Tensor:
        h = rows @ rounding.weights(experts.w13[e]).T
        return h if experts.w13_bias is None else h + experts.w13_bias[e]

    width = experts.w13[0].shape[0]
    h = rounding.store(_by_expert(expert, x[row], width, linear1), plan.gate_up)

    gate, up = split_gate_up(h, experts.activation)
    a = combine_gate_up(gate, up, experts.activation, experts.limit, experts.alpha)
    act_gate = a
    if is_gated(experts.activation) and plan.act_chain:
        act_gate = rounding.store(activated_gate(gate, experts), "io")
        a = act_gate * up_factor(up, experts)
    a = rounding.store(a, plan.act)

    operand = a
    if quantized:
        a_ratio, a_scale = quantize_activation(a, quantized, experts.a2_scale, rounded=False)
        operand = (round_to(a_ratio, "e4m3") if rounding.repeat else a_ratio) * a_scale
    operand = rounding.operand(operand)

    def linear2(e: int, rows: Tensor) -> Tensor:
        y = rows @ rounding.weights(experts.w2[e]).T
        return y if experts.w2_bias is None else y + experts.w2_bias[e]

    y = _by_expert(expert, operand, hidden_states.shape[1], linear2)
    if plan.weight == "before_store":
        slots = rounding.store(y * weight[:, None], plan.slot)
    else:
        slots = rounding.store(y, plan.slot) * weight[:, None]
        slots = rounding.store(slots, "io" if plan.weight == "rounded" else "fp32")
    out = torch.zeros_like(hidden_states).index_add_(0, token, slots)
    return Stages(
        token, slot, expert, weight, row, x, h, act_gate, a, operand, y, out, x_ratio, x_scale, a_ratio, a_scale
    )  # fmt: skip


def _limit(experts: Experts) -> float:
    if experts.limit is not None:
        return experts.limit
    return 7.0 if experts.activation == "swigluoai" else float("inf")


def activated_gate(gate: Tensor, experts: Experts) -> Tensor:
    """act(gate) alone, after the clamp: the first half of an activation that rounds between its two halves."""
    one = torch.zeros_like(gate) if experts.activation == "swigluoai" else torch.ones_like(gate)
    gate = torch.minimum(gate, gate.new_tensor(_limit(experts)))
    return combine_gate_up(gate, one, experts.activation, float("inf"), experts.alpha)


def up_factor(up: Tensor, experts: Experts) -> Tensor:
    """What act(gate) is multiplied by: up, clamped, plus one for swigluoai."""
    up = up.clamp(-_limit(experts), _limit(experts))
    return up + 1 if experts.activation == "swigluoai" else up


def moe(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: Experts, rounding: Rounding = Rounding()
) -> Tensor:
    """The layer's output [T, K], float64."""
    return forward(hidden_states, topk_weights, topk_ids, experts, rounding).out
