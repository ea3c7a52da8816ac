"""Backend "torch-grouped-mm": the layer as two of torch's grouped matrix products, on any device that has them.

Pairs (token, slot) are sorted by expert, multiplied, activated in float32, multiplied again, put back in (token, slot)
order and summed over the slots in float32: a gather, no atomics, so the result is deterministic. Nothing depends on
the routing but the values in `offs`: no synchronization, no data-dependent shape.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layer import ALPHA, DTYPES, Layer, effective_limit, make_layer, require_tokens


def grouped_mm_function() -> Callable[..., Tensor] | None:
    """torch's grouped_mm(a [P, K], b [E, K, N], offs=int32 [E]) -> [P, N], public or private; None without one."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@cache
def grouped_mm_refusal(device: str, dtype: torch.dtype) -> str | None:
    """Why torch's grouped_mm does not take this dtype on this device type, or None. Tries it: the dtypes differ by
    device and torch version (CPU all three; CUDA of torch 2.11 bfloat16 only), and torch has no query for them."""
    product = grouped_mm_function()
    if product is None:
        return f"torch {torch.__version__} has no grouped_mm"
    module = getattr(torch, device, None)
    if module is None or not module.is_available():
        device = "cpu"  # an emulated device: its tensors lie on the CPU
    a = torch.ones(16, 16, device=device, dtype=dtype)
    b = torch.ones(2, 16, 16, device=device, dtype=dtype)
    offs = torch.tensor([8, 16], device=device, dtype=torch.int32)
    try:
        product(a, b.transpose(-2, -1), offs=offs)
    except (RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} grouped_mm on {device}: {str(error).splitlines()[0]}"
    return None


def row_stride_refusal(problem: Any) -> str | None:
    """grouped_mm wants rows that are multiples of 16 bytes, in both operands and both products."""
    size = 4 if problem.dtype == "fp32" else 2
    for name in ("hidden_size", "intermediate_size"):
        row = getattr(problem, name) * size
        if row % 16:
            return f"shape: {name}={getattr(problem, name)} makes rows of {row} bytes; grouped_mm wants multiples of 16"
    return None


class GroupedMM:
    """Sort, grouped_mm, activation, grouped_mm, weighted sum. Unquantized, every activation, either layout, expert
    parallelism, invalid ids, shared experts."""

    name = "torch-grouped-mm"
    devices = {"cpu", "cuda", "xpu"}
    promises = {"errors", "no_wait", "graph"}

    def available(self) -> str | None:
        """None, or why this torch cannot run it."""
        return None if grouped_mm_function() else f"torch {torch.__version__} has no grouped_mm"

    def supports(self, problem: Any, device: str | None = None) -> str | None:
        """None or "<keyword>: reason". With a device type ("cpu", "cuda", "xpu") the dtype is tried on it."""
        if problem.quant is not None:
            return "quant: torch's grouped_mm multiplies bf16, fp16 and fp32 only"
        if problem.dtype not in DTYPES:
            return f"dtype: {problem.dtype}; valid: {', '.join(DTYPES)}"
        if problem.router_weight_on_input and problem.shared_experts:
            return "router_weight_on_input: not together with shared experts"
        refusal = row_stride_refusal(problem)
        if refusal is None and (device := device or getattr(problem, "device", None)):
            reason = grouped_mm_refusal(torch.device(device).type, DTYPES[problem.dtype])
            refusal = reason and f"dtype: {reason}"
        return refusal

    def plans(self, problem: Any) -> list[dict]:
        """One plan. grouped_mm stores in io and takes no bias: a bias is added in float32 to the stored product and
        not rounded again, which is one rounding where the plan says, of a value that is smaller by the bias."""
        return [
            {
                "gate_up": "io", "act_chain": False, "act": "io", "slot": "io", "weight": "after_store",
                "router_weight": "fp32", "combine": "fp32", "weighted_input": "io", "quantizes_activations": False,
            }
        ]  # fmt: skip

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k], topk_ids [T, k], out=None) -> [T, K] io.

        Every call reads the layer anew; nothing is kept. TypeError or ValueError, before out is written, if an argument
        or the layer does not fit."""

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            problem = layer.problem
            require_tokens(hidden_states, topk_weights, topk_ids, problem.router_weight_on_input, out)
            checked = make_layer(
                hidden_states, layer.w13, layer.w2, activation=problem.activation, limit=problem.limit,
                w13_bias=layer.w13_bias, w2_bias=layer.w2_bias, expert_map=layer.expert_map, layout=problem.layout,
                num_experts=problem.num_experts, shared_experts=problem.shared_experts,
                apply_router_weight_on_input=problem.router_weight_on_input,
            )  # fmt: skip
            result = _forward(checked, problem.shared_experts, hidden_states, topk_weights, topk_ids)
            return result if out is None else out.copy_(result)

        return call


def _forward(layer: Layer, shared: int, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    product = grouped_mm_function()
    assert product is not None
    # Views: torch's grouped_mm reads either order of the last two dimensions.
    w13, w2 = layer.w13.w.transpose(-2, -1), layer.w2.w.transpose(-2, -1)
    tokens, hidden = hidden_states.shape
    if tokens == 0:
        return torch.empty_like(hidden_states)
    experts = w13.shape[0]

    local, weights = local_experts(topk_ids, layer.num_experts, layer.expert_map, experts), topk_weights
    if layer.weight_on_input:
        hidden_states = (hidden_states.float() * weights[:, :1]).to(hidden_states.dtype)
        weights = torch.ones_like(weights)
    if shared:
        always = torch.arange(experts - shared, experts, device=local.device).expand(tokens, -1)
        local = torch.cat([local, always], 1)
        weights = torch.cat([weights, weights.new_ones(always.shape)], 1)
    slots = local.shape[1]

    # Invalid slots carry the id `experts`: they sort behind every expert and lie past offs[-1].
    expert, order = torch.sort(local.flatten(), stable=True)
    offs = torch.searchsorted(expert, torch.arange(experts, device=expert.device), right=True).to(torch.int32)
    served = (expert < experts).unsqueeze(-1)
    expert = expert.clamp_(max=experts - 1)

    h = product(hidden_states[order // slots], w13, offs=offs).float()
    if layer.w13.bias is not None:
        h = h + layer.w13.bias.float()[expert]
    a = activate(h, layer.activation, layer.limit).to(hidden_states.dtype)
    y = product(a, w2, offs=offs).float()
    if layer.w2.bias is not None:
        y = y + layer.w2.bias.float()[expert]
    # Rows past offs[-1] were never written by either product: masked, not multiplied by zero (0 * NaN is NaN).
    y = y.masked_fill(~served, 0.0)

    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    y = y[back].view(tokens, slots, hidden)
    # The weight of an invalid slot may be anything, NaN included.
    weights = weights.masked_fill(local >= experts, 0.0)
    return (y * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def local_experts(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None, experts: int) -> Tensor:
    """[T, k] int64: the local expert of each slot, or `experts` where none serves it."""
    ids = topk_ids.long()
    valid = (ids >= 0) & (ids < num_experts)
    if expert_map is not None:
        ids = expert_map.long()[ids.clamp(0, num_experts - 1)]
        valid &= ids >= 0
    return torch.where(valid, ids, experts)


def activate(h: Tensor, activation: str, limit: float | None) -> Tensor:
    """GEMM 2's operand [P, I] from GEMM 1's result h [P, 2I] (relu2: [P, I]), in h's dtype. ValueError if unknown."""
    if activation == "relu2":
        return F.relu(h).square()
    gate, up = (h[..., 0::2], h[..., 1::2]) if activation == "swigluoai" else h.chunk(2, dim=-1)
    limit = effective_limit(activation, limit)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation == "swigluoai":
        return gate * torch.sigmoid(ALPHA * gate) * (up + 1)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    }  # fmt: skip
    if activation not in functions:
        raise ValueError(f"activation={activation!r}; valid: {', '.join(functions)}, swigluoai, relu2")
    return functions[activation](gate) * up
