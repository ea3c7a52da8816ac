"""A correct fused MoE in plain torch float32, with every legal liberty a real kernel takes as a switch.

It is the control group: whatever it is set to, the harness must not accuse it. Written against the public protocol of a
backend alone; it shares no code with the oracle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FP8 = torch.float8_e4m3fn


class Emulated:
    """`plan` says what is stored where (reference/plan.py); the other switches are free choices of a correct kernel."""

    devices = {"cpu", "cuda", "xpu"}

    def __init__(
        self, name: str = "emulated", split_k: int = 1, stride_k: bool = False, reverse_slots: bool = False,
        reciprocal: bool = False, divided_sigmoid: bool = False, permute_experts: bool = False, **plan,
    ) -> None:  # fmt: skip
        self.name, self.split_k, self.stride_k, self.reverse_slots = name, split_k, stride_k, reverse_slots
        self.reciprocal, self.divided_sigmoid, self.permute_experts = reciprocal, divided_sigmoid, permute_experts
        self.plan = plan

    def plans(self, problem):
        return [{"act": "io", **self.plan}] if problem.dtype != "fp32" else [self.plan]

    def says(self, field, default="fp32"):
        return self.plan.get(field, default)

    # -- arithmetic ---------------------------------------------------------------------------------------------------
    def store(self, value: Tensor, where: str, io: torch.dtype) -> Tensor:
        return value.to(io).float() if where == "io" else value

    def linear(self, x: Tensor, w: Tensor) -> Tensor:
        """x [m, K] @ w [N, K].T in float32, in whatever order of summation was asked for."""
        if self.split_k == 1:
            return x @ w.T
        k = torch.arange(x.shape[1], device=x.device)
        part = k % self.split_k if self.stride_k else k * self.split_k // x.shape[1]
        return sum(x[:, part == i] @ w[:, part == i].T for i in range(self.split_k))

    def quantize(self, x: Tensor, granularity: str, static: Tensor | None) -> Tensor:
        if not x.numel():
            return x
        if static is not None:
            scale = static.reshape(1, 1)
        elif granularity == "tensor":
            scale = x.abs().nan_to_num().amax().clamp(min=1e-10).reshape(1, 1) / 448
        elif granularity == "token":
            scale = x.abs().nan_to_num().amax(1, keepdim=True).clamp(min=1e-10) / 448
        else:
            pad = -x.shape[1] % 128
            groups = F.pad(x.abs().nan_to_num(), (0, pad)).reshape(len(x), -1, 128).amax(2).clamp(min=1e-10) / 448
            scale = groups.repeat_interleave(128, 1)[:, : x.shape[1]]
        ratio = x * (1 / scale) if self.reciprocal else x / scale
        return ratio.clamp(-448, 448).to(FP8).float() * scale

    def activation(self, h: Tensor, problem, io: torch.dtype) -> Tensor:
        chain = self.says("act_chain", False)
        if problem.activation == "relu2":
            return F.relu(h) ** 2
        if problem.activation == "swigluoai":
            limit = problem.limit or 7.0
            g, u = h[:, 0::2].clamp(max=limit), h[:, 1::2].clamp(-limit, limit) + 1
            act = g * torch.sigmoid(1.702 * g)
        else:
            g, u = h.chunk(2, 1)
            if problem.limit is not None:
                g, u = g.clamp(max=problem.limit), u.clamp(-problem.limit, problem.limit)
            if problem.activation == "silu":
                act = g / (1 + torch.exp(-g)) if self.divided_sigmoid else g * torch.sigmoid(g)
            else:
                act = F.gelu(g, approximate="tanh" if problem.activation == "gelu_tanh" else "none")
        return (act.to(io).float() if chain else act) * u

    # -- the layer ----------------------------------------------------------------------------------------------------
    def prepare(self, problem, layer):
        return lambda *args, **kwargs: self.run(layer, *args, **kwargs)

    def weights(self, layer, name: str, e: int) -> Tensor:
        problem = layer.problem
        w = getattr(layer, name)[e].float()
        w = w.T if problem.layout == "kn" else w
        scale = getattr(layer, f"{name}_scale")
        if scale is None:
            return w
        scale = scale[e]
        if problem.quant.weight == "channel":
            return w * scale[:, None]
        if problem.quant.weight == "block":
            scale = scale.T if problem.layout == "kn" else scale
            scale = scale.repeat_interleave(128, 0)[: w.shape[0]].repeat_interleave(128, 1)[:, : w.shape[1]]
        return w * scale

    def run(self, layer, hidden_states, topk_weights, topk_ids, out=None):
        problem, io = layer.problem, hidden_states.dtype
        x, ids = hidden_states.float(), topk_ids.long()
        weight = topk_weights.to(io).float() if self.says("router_weight") == "io" else topk_weights
        local = torch.where((ids >= 0) & (ids < problem.num_experts), ids, -1)
        if layer.expert_map is not None:
            local = torch.where(local >= 0, layer.expert_map.long()[local.clamp(min=0)], -1)
        if problem.shared_experts:
            first = len(layer.w13) - problem.shared_experts
            always = torch.arange(first, len(layer.w13), device=ids.device).expand(len(ids), -1)
            local = torch.cat([local, always], 1)
            weight = torch.cat([weight, torch.ones_like(always, dtype=weight.dtype)], 1)
        if problem.router_weight_on_input:
            plain, x = (
                x,
                self.store(
                    x * weight[:, :1], self.says("weighted_input", "accumulator").replace("accumulator", "-"), io
                ),
            )
            weight = torch.ones_like(weight)
            if problem.shared_experts:  # they see the input as it came
                x = torch.cat([x, plain])
        quantized = problem.quant.activation if problem.quant and self.says("quantizes_activations", True) else None
        static = quantized == "tensor_static"
        granularity = "tensor" if static else quantized
        if quantized:
            x = self.quantize(x, granularity, layer.a13_scale if static else None)
        token, slot = torch.nonzero(local >= 0, as_tuple=True)
        expert = local[token, slot]
        own_row = problem.router_weight_on_input & (slot >= topk_ids.shape[1])
        row = torch.where(own_row, token + len(hidden_states), token)
        order = sorted(expert.unique().tolist(), reverse=self.permute_experts)
        rows = {e: torch.nonzero(expert == e).flatten() for e in order}
        width = problem.w13_rows
        h = x.new_zeros(len(token), width)
        for e in order:
            y = self.linear(x[row[rows[e]]], self.weights(layer, "w13", e))
            h[rows[e]] = y if layer.w13_bias is None else y + layer.w13_bias[e].float()
        h = self.store(h, self.says("gate_up"), io)
        a = self.activation(h, problem, io)
        a = self.store(a, self.says("act", "io" if problem.dtype != "fp32" else "fp32"), io)
        if quantized:
            a = self.quantize(a, granularity, layer.a2_scale if static else None)
        slots = x.new_zeros(len(token), x.shape[1])
        for e in order:
            y = self.linear(a[rows[e]], self.weights(layer, "w2", e))
            slots[rows[e]] = y if layer.w2_bias is None else y + layer.w2_bias[e].float()
        pair_weight = weight[token, slot][:, None]
        if self.says("weight", "before_store") == "before_store":
            slots = self.store(slots * pair_weight, self.says("slot"), io)
        else:
            slots = self.store(slots, self.says("slot"), io) * pair_weight
            slots = self.store(slots, "io" if self.says("weight") == "rounded" else "fp32", io)
        total = x.new_zeros(hidden_states.shape)
        columns = range(local.shape[1])
        for j in reversed(columns) if self.reverse_slots else columns:
            mine = torch.nonzero(slot == j).flatten()
            total = self.store(total.index_add(0, token[mine], slots[mine]), self.says("combine"), io)
        result = total.to(io)
        if out is None:
            return result
        out.copy_(result)
        return out


CONTROLS = [
    Emulated("plain"),
    Emulated("split-k-2", split_k=2),
    Emulated("split-k-8", split_k=8),
    Emulated("strided-split-k-4", split_k=4, stride_k=True),
    Emulated("reversed-slots", reverse_slots=True),
    Emulated("reciprocal-scale", reciprocal=True),
    Emulated("divided-sigmoid", divided_sigmoid=True),
    Emulated("reversed-experts", permute_experts=True),
    Emulated("h-16-bit", gate_up="io"),
    Emulated("slot-16-bit", slot="io"),
    Emulated("h-slot-16-bit-split-k", gate_up="io", slot="io", split_k=4),
    Emulated("torch-chain", gate_up="io", act_chain=True),
    Emulated("weight-after-store", slot="io", weight="after_store"),
    Emulated("weight-rounded", slot="io", weight="rounded"),
    Emulated("router-weight-16-bit", router_weight="io"),
    Emulated("weighted-input-16-bit", weighted_input="io"),
    Emulated("running-sum-16-bit", slot="io", weight="rounded", combine="io"),
    Emulated(
        "everything-16-bit", gate_up="io", act_chain=True, slot="io", weight="rounded", router_weight="io", combine="io"
    ),
    Emulated("weight-only", quantizes_activations=False),
    Emulated("weight-only-16-bit", quantizes_activations=False, gate_up="io", slot="io"),
]
