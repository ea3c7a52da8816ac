"""The oracle for one call, open at every stage: with other inputs, or resumed from another intermediate value.

    o = Oracle(inputs)
    o.right                     its answer
    o(weights=o.weights**2)     its answer for other inputs, experts or plan
    o.resume(h=changed)         its answer for another output of GEMM 1

diagnose/faults makes wrong answers with it. Everything is float64 on the CPU.
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
from reference import moe
from reference.formats import decode, round_to
from reference.moe import Experts, Rounding, Values
from reference.plan import RoundingPlan

#: The value that follows from the one before it, and the stage of reference.moe that computes it.
COMPUTED_BY = {
    "x": "quantize_input",
    "h": "gemm_1",
    "a": "activate",
    "operand": "quantize_activation",
    "y": "gemm_2",
    "slots": "weigh",
    "out": "combine",
}


@dataclass
class Answer:
    """The answer of the oracle, or of a fault."""

    stages: Values
    experts: Experts
    rounding: Rounding

    def expected(self) -> Expected:
        """Return the answer with the deviation of a kernel that computes just this."""
        return propagate(self.stages, self.experts, self.rounding)


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
        self.quantized = self.experts.quantized_by(chosen) is not None
        self.rounding = Rounding(chosen, self.problem.dtype, repeat=plan is not None and self.quantized)

    @cached_property
    def right(self) -> Answer:
        """The right answer."""
        return self()

    @property
    def s(self) -> Values:
        """The values of the right answer."""
        return self.right.stages

    def __call__(
        self, x: Tensor | None = None, weights: Tensor | None = None, ids: Tensor | None = None,
        layer: Layer | None = None, rounding: Rounding | None = None, **of_experts: Any,
    ) -> Answer:  # fmt: skip
        """Return the answer for another x, router weights or ids, layer (on the CPU, in layout "nk"), rounding, or
        fields of Experts."""
        experts = replace(self.experts if layer is None else dense(layer), **of_experts)
        rounding = rounding or self.rounding
        x, weights = self.x if x is None else x, self.weights if weights is None else weights
        return Answer(moe.forward(x, weights, self.ids if ids is None else ids, experts, rounding), experts, rounding)

    def of(self, layer: Layer) -> Oracle:
        """Return the oracle of another layer (on the CPU, in layout "nk") for the same call, under the same plan."""
        other = Oracle(replace(self.inputs, layer=layer))
        other.rounding, other.quantized = self.rounding, self.quantized
        return other

    def resume(self, **known: Tensor | None) -> Answer:
        """Return the answer that follows from other values: fields of Values, at least one of COMPUTED_BY.

        The stages after the last one of these run again.
        """
        values: Any = known
        last = [stage for name, stage in COMPUTED_BY.items() if name in known][-1]
        resumed = moe.resume(replace(self.s, **values), self.experts, self.rounding, after=last)
        return Answer(resumed, self.experts, self.rounding)

    def rows(self) -> Tensor:
        """Return the rows [R, K] of GEMM 1's operand before they are quantized."""
        return moe.input_rows(self.s, self.experts, self.rounding)

    def stored(self, answer: Answer) -> Tensor:
        """Return the answer's output as the backend would store it, if nothing was rounded before."""
        return round_to(answer.stages.out, self.problem.dtype)


def on_cpu(layer: Layer) -> Layer:
    """Return the layer with its tensors on the CPU."""
    return Layer(layer.problem, **{name: t.cpu() for name, t in layer.tensors().items()})


def dense(layer: Layer) -> Experts:
    """Return the layer's weights for the oracle, all experts decoded."""
    experts = oracle_experts(layer)

    def whole(stack: Any) -> Tensor:
        return torch.stack([stack[e] for e in range(len(stack))])

    return replace(experts, w13=whole(experts.w13), w2=whole(experts.w2))
