"""The layer for the oracle: weights decoded to float64 one expert at a time, and the output of an exact fill."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.backend import Layer
from harness.inputs.draw import Inputs
from reference.formats import decode, round_to
from reference.moe import Experts, forward
from reference.quant import dequantize_weight
from reference.scheme import Scheme


@dataclass(frozen=True)
class Decoded:
    """A stack of expert weights [E, N, K] that decodes to float64 one expert at a time."""

    codes: Tensor
    scale: Tensor | None
    scheme: Scheme | None
    device: torch.device | None

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> torch.Size:
        """[E, N, K]"""
        return self.codes.shape

    def __getitem__(self, expert: int) -> Tensor:
        place = self.device or torch.device("cpu")
        codes = self.codes[expert].to(place)
        if self.scale is None or self.scheme is None:
            return decode(codes)
        return dequantize_weight(codes, self.scale[expert].to(place), self.scheme)


def oracle_experts(layer: Layer, device: torch.device | None = None) -> Experts:
    """Return the weights of a layer in layout "nk" for the oracle, on `device` (default: the CPU)."""
    problem, quant = layer.problem, layer.problem.quant
    place = device or torch.device("cpu")

    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(place, torch.float64)

    scheme = quant.weights if quant else None
    return Experts(
        w13=Decoded(layer.w13, layer.w13_scale, scheme, device),
        w2=Decoded(layer.w2, layer.w2_scale, scheme, device),
        activation=problem.activation,
        limit=problem.limit,
        w13_bias=wide(layer.w13_bias),
        w2_bias=wide(layer.w2_bias),
        expert_map=None if layer.expert_map is None else layer.expert_map.to(place),
        num_experts=problem.num_experts,
        router_weight_on_input=problem.router_weight_on_input,
        shared=problem.shared_experts,
        activation_quant=quant.activations if quant else None,
        a13_scale=None if layer.a13_scale is None else float(layer.a13_scale),
        a2_scale=None if layer.a2_scale is None else float(layer.a2_scale),
    )


def exact_output(inputs: Inputs, device: torch.device | None = None) -> Tensor:
    """Return the output [T, K] of a correct kernel for an exact fill: the oracle's, rounded once to the io dtype."""
    place = device or torch.device("cpu")
    experts = oracle_experts(inputs.layer, device)
    x, weights = decode(inputs.hidden_states.to(place)), inputs.topk_weights.to(place, torch.float64)
    stages = forward(x, weights, inputs.topk_ids.to(place), experts)
    return round_to(stages.out, inputs.case.problem.dtype)
