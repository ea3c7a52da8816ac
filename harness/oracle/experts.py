"""The layer as the oracle gets it: weights decoded to float64, one expert at a time, and the output that is exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.backend import Layer
from harness.inputs.draw import Inputs
from reference.formats import decode, round_to
from reference.moe import Experts, forward
from reference.quant import dequantize_weight


@dataclass(frozen=True)
class Decoded:
    """A stack of expert weights that decodes to float64 one expert at a time."""

    codes: Tensor
    scale: Tensor | None
    granularity: str
    device: torch.device | None

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, expert: int) -> Tensor:
        place = self.device or torch.device("cpu")
        codes = self.codes[expert].to(place)
        if self.scale is None:
            return decode(codes)
        return dequantize_weight(codes, self.scale[expert].to(place), self.granularity)


def oracle_experts(layer: Layer, device: torch.device | None = None) -> Experts:
    """The layer (in layout "nk") as the oracle sees it."""
    problem, quant = layer.problem, layer.problem.quant
    place = device or torch.device("cpu")

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(place, torch.float64)

    granularity = quant.weight if quant else "tensor"
    activation_quant = quant.activation if quant else None
    return Experts(
        w13=Decoded(layer.w13, layer.w13_scale, granularity, device),
        w2=Decoded(layer.w2, layer.w2_scale, granularity, device),
        activation=problem.activation,
        limit=problem.limit,
        w13_bias=wide(layer.w13_bias),
        w2_bias=wide(layer.w2_bias),
        expert_map=None if layer.expert_map is None else layer.expert_map.to(place),
        num_experts=problem.num_experts,
        router_weight_on_input=problem.router_weight_on_input,
        shared=problem.shared_experts,
        activation_quant="tensor" if activation_quant == "tensor_static" else activation_quant,
        a13_scale=None if layer.a13_scale is None else float(layer.a13_scale),
        a2_scale=None if layer.a2_scale is None else float(layer.a2_scale),
    )


def exact_output(inputs: Inputs, device: torch.device | None = None) -> Tensor:
    """What every correct kernel returns for an exact fill: the oracle's output, rounded once to the io dtype."""
    place = device or torch.device("cpu")
    experts = oracle_experts(inputs.layer, device)
    x, weights = decode(inputs.hidden_states.to(place)), inputs.topk_weights.to(place, torch.float64)
    stages = forward(x, weights, inputs.topk_ids.to(place), experts)
    return round_to(stages.out, inputs.case.problem.dtype)
