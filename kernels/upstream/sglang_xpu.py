"""Backend "sglang-xpu": `fused_experts` of sgl-kernel-xpu, as SGLang calls it on an Intel GPU.

A router weight on the input is SGLang's doing, not the kernel's: hidden_states are multiplied by it, and the kernel
gets ones. Expert parallelism as in SGLang's dispatcher: local ids, -1 for experts of other ranks. swigluoai is silu
with gemm1_alpha and gemm1_limit. Layout "nk" as it comes; every call reads the layer anew.

sgl-kernel-xpu is built from source for Xe2 and is on no registry; packages named sgl-kernel there are CUDA's. What a
build can do is asked of the signature of its function. Never run on the real one: tests have a recording fake.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from kernels.layer import ALPHA, effective_limit
from kernels.upstream.expert_ids import BEYOND, local_ids

#: The harness's names -> sgl-kernel-xpu's, whose gelu is the approximation by tanh.
ACTIVATIONS = {"silu": "silu", "swigluoai": "silu", "gelu_tanh": "gelu", "relu2": "relu2"}
V4_LIMIT = 10.0  #: the only swiglu_limit that it takes, and of 4-bit weights only


@cache
def import_sgl_kernel() -> Any:
    """The module sgl_kernel, or what its import raises."""
    return importlib.import_module("sgl_kernel")


def _parameters() -> set[str]:
    return set(inspect.signature(import_sgl_kernel().fused_experts).parameters)


class SglangXpu:
    name = "sglang-xpu"
    devices = {"xpu"}
    batch_invariant = False  # the fused activation is for many rows of an expert only

    def available(self) -> str | None:
        """None, or why it cannot be used here: no XPU, no sgl_kernel, or one without fused_experts."""
        if find_spec("sgl_kernel") is None:
            return "the package sgl_kernel is not installed (sgl-kernel-xpu, built from source for Xe2)"
        try:
            module = import_sgl_kernel()
        except Exception as error:  # a kernel library raises what it likes: OSError, RuntimeError, AttributeError
            return f"sgl_kernel cannot be imported: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if not callable(getattr(module, "fused_experts", None)):
            return "sgl_kernel has no fused_experts: it is CUDA's, not sgl-kernel-xpu"
        return None if torch.xpu.is_available() else "fused_experts of sgl-kernel-xpu needs an Xe2 GPU"

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if problem.layout != "nk":
            return f"layout: {problem.layout}; w1 is [E, 2I, H] and w2 [E, H, I]"
        if problem.quant is not None:
            return "quant: fp8 is asserted off in sgl-kernel-xpu; its 4-bit formats are not asked for here"
        if problem.dtype == "fp32":
            return "dtype: fp32; its products are of bf16 and fp16"
        if problem.activation not in ACTIVATIONS:
            return f"activation: {problem.activation}; valid: {', '.join(ACTIVATIONS)} (its gelu is tanh's)"
        if problem.limit is not None and problem.activation != "swigluoai":
            return f"activation: a clamp of silu is for 4-bit weights only, and at {V4_LIMIT:g}"
        if problem.shared_experts:
            return "shared_experts: SGLang gives them ids of their own when it routes"
        if problem.routing == "beyond":
            return BEYOND
        wanted = {"b1", "b2"} if problem.bias else set()
        wanted |= {"gemm1_alpha", "gemm1_limit"} if problem.activation == "swigluoai" else set()
        if lacking := wanted - _parameters():
            keyword = "bias" if problem.bias and "b1" in lacking else "activation"
            return f"{keyword}: fused_experts of this sgl_kernel has no {', '.join(sorted(lacking))}"
        return None

    def plans(self, problem: Any) -> list[dict]:
        """Two paths, by size: GEMM 1 stores its product, or the activation of it. SGLang rounds a router weight on the
        input, and what it multiplies."""
        plan: dict[str, Any] = {"act": "io", "slot": "io", "weight": "after_store"}
        if problem.router_weight_on_input:
            plan |= {"weighted_input": "io", "router_weight": "io"}
        return [{**plan, "gate_up": "io"}, plan]

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k] float32, topk_ids [T, k], out=None) -> [T, K] io."""
        fused_experts = import_sgl_kernel().fused_experts
        parameters = _parameters()

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            problem = layer.problem
            topk_ids = local_ids(topk_ids, layer.expert_map)
            if problem.router_weight_on_input:
                hidden_states = hidden_states * topk_weights.to(hidden_states.dtype)
                topk_weights = torch.ones_like(topk_weights)
            options = {"b1": layer.w13_bias, "b2": layer.w2_bias}
            if problem.activation == "swigluoai":
                limit = effective_limit(problem.activation, problem.limit)
                options |= {"gemm1_alpha": ALPHA, "gemm1_limit": limit}
            options = {name: value for name, value in options.items() if value is not None}
            if "inplace" in parameters:  # stated: where it is not, another version's default would overwrite the input
                options["inplace"] = False
            result = fused_experts(
                hidden_states, layer.w13, layer.w2, topk_weights, topk_ids,
                activation=ACTIVATIONS[problem.activation], **options,
            )  # fmt: skip
            return result if out is None else out.copy_(result)

        return call
