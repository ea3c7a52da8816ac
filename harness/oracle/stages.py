"""The oracle for one call, open at every stage: given something else, or taken up from an intermediate value on.

    o = Oracle(given)
    o.right                     its answer
    o(weights=o.weights**2)     its answer for other inputs, experts or plan
    o.resume(h=changed)         its answer if GEMM 1 had given that

diagnose/match.py makes wrong answers of it. Everything is float64 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from harness.backend import Layer
from harness.inputs.draw import Inputs
from harness.oracle.deviation import Expected, propagate
from harness.oracle.experts import oracle_experts
from reference.activation import combine_gate_up, is_gated, split_gate_up
from reference.formats import decode, round_to
from reference.moe import Experts, Rounding, Stages, activated_gate, forward, up_factor
from reference.plan import RoundingPlan
from reference.quant import quantize_activation

#: The values between hidden_states and out, each computed from those before it.
ORDER = ("x", "h", "a", "operand", "y", "slots", "out")


@dataclass
class Answer:
    """What the oracle, or a wrong one, answers."""

    stages: Stages
    experts: Experts
    rounding: Rounding

    def expected(self) -> Expected:
        """The answer with the deviation of a kernel that computes just this."""
        slots = int(self.stages.slot.max()) + 1 if len(self.stages.slot) else 1
        return propagate(self.stages, self.experts, self.rounding, slots)


class Oracle:
    """The oracle for the inputs of one call, under a plan (default: nothing rounded, as for an exact fill)."""

    def __init__(self, inputs: Inputs, plan: RoundingPlan | None = None) -> None:
        self.inputs, self.problem = inputs, inputs.case.problem
        self.layer = on_cpu(inputs.layer)
        self.experts = dense(self.layer)
        self.x = decode(inputs.hidden_states.cpu())  #: [T, K]
        self.weights = inputs.topk_weights.to("cpu", torch.float64)  #: [T, k]
        self.ids = inputs.topk_ids.cpu().long()  #: [T, k]
        chosen = plan or RoundingPlan()
        self.quantized = bool(self.experts.activation_quant) and chosen.quantizes_activations
        self.rounding = Rounding(chosen, self.problem.dtype, repeat=plan is not None and self.quantized)

    @cached_property
    def right(self) -> Answer:
        return self()

    @property
    def s(self) -> Stages:
        """The right answer's stages."""
        return self.right.stages

    def __call__(
        self, x: Tensor | None = None, weights: Tensor | None = None, ids: Tensor | None = None,
        layer: Layer | None = None, rounding: Rounding | None = None, **of_experts: Any,
    ) -> Answer:  # fmt: skip
        """The answer for another x, router weights or ids, layer (on the CPU, in layout "nk"), rounding, or fields of
        Experts."""
        experts = replace(self.experts if layer is None else dense(layer), **of_experts)
        rounding = rounding or self.rounding
        x, weights = self.x if x is None else x, self.weights if weights is None else weights
        return Answer(forward(x, weights, self.ids if ids is None else ids, experts, rounding), experts, rounding)

    def of(self, layer: Layer) -> Oracle:
        """The oracle of another layer (on the CPU, in layout "nk") for the same call, under the same plan."""
        other = Oracle(replace(self.inputs, layer=layer))
        other.rounding, other.quantized = self.rounding, self.quantized
        return other

    def resume(self, slots: Tensor | None = None, **known: Tensor | None) -> Answer:
        """The answer that follows from values of ORDER: fields of Stages, and slots [P, K], what is added up. Fields
        that are no values (row, expert, weight) may come along."""
        experts, rounding, plan = self.experts, self.rounding, self.rounding.plan
        inputs: dict[str, Any] = known
        s = replace(self.s, **inputs)
        last = max(ORDER.index(n) for n in (*known, *(["slots"] if slots is not None else [])) if n in ORDER)
        if last < ORDER.index("h"):
            h = linear(s.expert, s.x[s.row], experts.w13, experts.w13_bias, rounding)
            s = replace(s, h=rounding.store(h, plan.gate_up))
        if last < ORDER.index("a"):
            s = replace(s, a=rounding.store(self.activated(s.h), plan.act))
        if last < ORDER.index("operand"):
            s = replace(s, **self.requantized(s.a)) if self.quantized else replace(s, operand=s.a)
            s = replace(s, operand=rounding.operand(s.operand))
        if last < ORDER.index("y"):
            s = replace(s, y=linear(s.expert, s.operand, experts.w2, experts.w2_bias, rounding))
        if last < ORDER.index("slots"):
            slots = weighted(s, rounding)
        if last < ORDER.index("out"):
            assert slots is not None
            s = replace(s, out=torch.zeros_like(self.x).index_add_(0, s.token, slots))
        return Answer(s, experts, rounding)

    def activated(self, h: Tensor) -> Tensor:
        """a [P, I] of h [P, 2I], as this plan rounds on the way."""
        experts = self.experts
        gate, up = split_gate_up(h, experts.activation)
        if is_gated(experts.activation) and self.rounding.plan.act_chain:
            return self.rounding.store(activated_gate(gate, experts), "io") * up_factor(up, experts)
        return combine_gate_up(gate, up, experts.activation, experts.limit, experts.alpha)

    def requantized(self, a: Tensor) -> dict[str, Tensor]:
        """The stages that quantizing a [P, I] gives."""
        ratio, scale = quantize_activation(a, self.experts.activation_quant, self.experts.a2_scale, rounded=False)
        codes = round_to(ratio, "e4m3") if self.rounding.repeat else ratio
        return {"operand": codes * scale, "a_ratio": ratio, "a_scale": scale}

    def rows(self) -> Tensor:
        """[R, K] the rows that GEMM 1's operand is made of, before they are quantized."""
        if not self.experts.router_weight_on_input:
            return self.x
        x = self.rounding.weighted_input(self.x * self.rounding.router_weight(self.weights))
        return torch.cat([x, self.x]) if self.experts.shared else x

    def stored(self, answer: Answer) -> Tensor:
        """The answer's output as the backend would store it, if nothing was rounded before."""
        return round_to(answer.stages.out, self.problem.dtype)


def linear(expert: Tensor, rows: Tensor, w: Tensor, bias: Tensor | None, rounding: Rounding) -> Tensor:
    """rows [P, K] @ w[expert of the row] [N, K] transposed, + bias[expert] [N]: [P, N]."""
    out = rows.new_zeros(len(rows), w.shape[1])
    for e in expert.unique().tolist():
        mine = torch.nonzero(expert == e).flatten()
        out[mine] = rows[mine] @ rounding.weights(w[e]).T
    return out if bias is None else out + bias[expert]


def weighted(s: Stages, rounding: Rounding) -> Tensor:
    """[P, K] y times the router weight, rounded where the plan says so: what is added up."""
    plan, weight = rounding.plan, s.weight[:, None]
    if plan.weight == "before_store":
        return rounding.store(s.y * weight, plan.slot)
    return rounding.store(rounding.store(s.y, plan.slot) * weight, "io" if plan.weight == "rounded" else "fp32")


def on_cpu(layer: Layer) -> Layer:
    return Layer(layer.problem, **{name: t.cpu() for name, t in layer.tensors().items()})


def dense(layer: Layer) -> Experts:
    """The layer as the oracle sees it, decoded at once."""
    experts = oracle_experts(layer)

    def whole(stack: Any) -> Tensor:
        return torch.stack([stack[e] for e in range(len(stack))])

    return replace(experts, w13=whole(experts.w13), w2=whole(experts.w2))
