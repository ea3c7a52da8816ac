"""Backend "vllm-xpu": the class XpuFusedMoe of the wheel vllm-xpu-kernels, which vLLM runs on Intel GPUs.

The instance is built in prepare() and kept, as its users do. It captures the tensors of the layer, not their values, so
it sees writes in place; a tensor that takes another's place, or another configuration, needs a new instance: `follows`
says so. The class infers from tensors what to compute (dtypes, scales) and has no flags for it:

    bf16, fp16            w13 [E, K, 2I], w2 [E, I, K]
    fp8 per tensor        scales [E]
    fp8 in blocks         scales [E, K/128, 2I/128] and [E, I/128, K/128]

Activations are never quantized (W8A16), whatever the problem says. relu2 is `relu2_no_mul` with w13 [E, K, I].

Without an XPU the wheel's Python runs over stand-ins for its native operators, on the CPU (vllm_xpu_operators): what it
captures, hands over and refuses is then real, what its kernels do is emulated.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.layer import DTYPES
from kernels.upstream.expert_ids import BEYOND
from kernels.upstream.package import missing

PACKAGE, DISTRIBUTION, OLDEST = "vllm_xpu_kernels", "vllm-xpu-kernels", (0, 1, 13)
EXTENSIONS = ("_C", "_moe_C", "_xpu_C")
TOP_K = (1, 2, 4, 6, 7, 8, 10, 12, 16)
BLOCK = 128
_ACTIVATIONS = {name: name for name in ("silu", "gelu", "gelu_tanh", "swigluoai")} | {"relu2": "relu2_no_mul"}
_import_lock = threading.Lock()


def emulated() -> bool:
    """Whether the native operators are stood in for: there is no XPU."""
    return not torch.xpu.is_available()


def interface() -> ModuleType:
    """The module vllm_xpu_kernels.fused_moe_interface, with its own operators on an XPU and stand-ins elsewhere."""
    name = f"{PACKAGE}.fused_moe_interface"
    with _import_lock:
        if not emulated():
            return importlib.import_module(name)
        from kernels.upstream import vllm_xpu_operators

        # The extensions need SYCL's libraries, and define operators of other extensions a second time. What stands for
        # them is empty, and there only while the wheel's own modules are imported.
        standing = [f"{PACKAGE}.{extension}" for extension in EXTENSIONS if f"{PACKAGE}.{extension}" not in sys.modules]
        sys.modules.update({extension: ModuleType(extension, "a stand-in") for extension in standing})
        try:
            module = importlib.import_module(name)
        finally:
            for extension in standing:
                del sys.modules[extension]
        vllm_xpu_operators.redirect(module, importlib.import_module(f"{PACKAGE}.moe_utils"))
        return module


def size_refusal(problem: Any) -> str | None:
    """Return None or "<keyword>: reason": the conditions under which the native operators raise."""
    inner, rows = problem.intermediate_size, problem.w13_rows
    if problem.top_k not in TOP_K:
        return f"shape: top_k={problem.top_k}; the operators are instantiated for {', '.join(map(str, TOP_K))}"
    if problem.hidden_size % 8 or rows % 8:
        return f"shape: hidden_size={problem.hidden_size}, w13 of {rows} rows; multiples of 8 only"
    if problem.quant is not None and problem.quant.weight == "block" and (problem.hidden_size | rows | inner) % BLOCK:
        return f"shape: hidden_size={problem.hidden_size}, intermediate_size={inner}; blocks of fp8 are whole ones"
    return None


def rounding(problem: Any) -> dict[str, Any]:
    """The plan: products stored in io; act(gate) rounded before it meets up, but in swigluoai; a gather in float32."""
    return {
        "gate_up": "io", "act_chain": problem.activation not in ("swigluoai", "relu2"), "act": "io", "slot": "io",
        "weight": "after_store", "router_weight": "fp32", "combine": "fp32", "quantizes_activations": False,
        "weights": "io" if problem.quant and problem.quant.weight == "block" else "exact",
    }  # fmt: skip


class VllmXpu:
    name = "vllm-xpu"
    devices = {"xpu"}
    xpu_contract = True
    batch_invariant = False  # tiles are chosen by the average number of rows
    follows = {"in_place"}  # the instance holds the tensors that it was built with

    def available(self) -> str | None:
        """None, or why it cannot be used here. Imports nothing."""
        return missing(DISTRIBUTION, since=OLDEST)

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if problem.layout != "kn":
            return f"layout: {problem.layout}; XpuFusedMoe has w13 [E, K, 2I] and w2 [E, I, K] only"
        if problem.activation not in _ACTIVATIONS:
            return f"activation: {problem.activation}; valid: {', '.join(_ACTIVATIONS)}"
        if problem.quant is not None and problem.quant.weight == "channel":
            return "quant: fp8 weights have a scale for each expert or for each block"
        if problem.router_weight_on_input:
            return "router_weight_on_input: XpuFusedMoe has no such parameter"
        if problem.shared_experts:
            return "shared_experts: XpuFusedMoe has routed experts only"
        if problem.routing == "beyond":
            return BEYOND
        return size_refusal(problem)

    def plans(self, problem: Any) -> list[dict]:
        """One plan, read off the operators' C++."""
        return [rounding(problem)]

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k] float32, topk_ids [T, k], out=None) -> [T, K] io."""
        rank, ranks = (0, 1) if problem.ep is None else (problem.ep.rank, problem.ep.size)
        instance = interface().XpuFusedMoe(
            layer.w13, layer.w13_scale, layer.w13_bias, layer.w2, layer.w2_scale, layer.w2_bias, problem.top_k,
            _ACTIVATIONS[problem.activation], problem.local_experts, ep_rank=rank, ep_size=ranks,
            expert_map=layer.expert_map, gemm1_clamp_limit=problem.limit,
        )  # fmt: skip

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            if out is None:
                out = torch.empty(hidden_states.shape, dtype=DTYPES[problem.dtype], device=hidden_states.device)
            instance.apply(out, hidden_states, topk_weights, topk_ids)
            return out

        return call
