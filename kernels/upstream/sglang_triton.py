"""Backend "sglang-triton": SGLang's Triton kernels, by the function behind its fused_experts.

Expert parallelism as in SGLang's dispatcher: ids become local ids, -1 where this rank has no such expert. Weights in
layout "nk" as they come; every call reads the layer anew. SGLang wants its server's configuration published: where
nobody has, a default one is, by the means its own tests have, and a tensor-parallel group of one is stated.

On a GPU its operators are compiled: moe_sum_reduce and moe_align_block_size by the package sgl_kernel, the activation
and the quantizers with the compiler of CUDA when they are first called.

On the CPU its kernels run in Triton's interpreter, with its default tiles. SGLang falls back to torch for the
activation, and has Triton kernels for the sum and for the alignment of small batches; large ones are aligned by torch.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from kernels.layer import ALPHA, DTYPES, effective_limit
from kernels.upstream.expert_ids import BEYOND, local_ids
from kernels.upstream.package import missing

OLDEST = (0, 5, 23)
UTILS = "sglang.srt.layers.moe.moe_runner.triton_utils"
BLOCK = 128
MOST_ALIGNED = 512  #: pairs in one program of SGLang's alignment for small batches, which compares each with each
ACTIVATIONS = {"silu": "silu", "swigluoai": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "relu2": "relu2"}
#: (weights, activations) that fused_experts multiplies in e4m3, with activations quantized by itself.
SCHEMES = {("tensor", "tensor_static"), ("tensor", "tensor"), ("channel", "token"), ("block", "group")}
_lock = threading.RLock()


@cache
def import_sglang() -> SimpleNamespace:
    """Its modules, ready to be called. Only where available() has no objection; ImportError names what is missing."""
    from kernels.upstream.transformers import import_transformers

    with _lock:
        import_transformers("utils.import_utils")  # SGLang imports it, and it must not take this project for a package
        context = importlib.import_module("sglang.srt.runtime_context")
        modules = SimpleNamespace(
            utils=importlib.import_module(UTILS),
            fused_moe=importlib.import_module(f"{UTILS}.fused_moe"),
            tiles=importlib.import_module(f"{UTILS}.fused_moe_triton_config"),
            align=importlib.import_module(f"{UTILS}.moe_align_block_size"),
        )
        if not context.get_context().is_config_namespace_published("exec"):
            context.get_context().override_server_args().install()
        try:
            _ = context.get_parallel().tp_group
        except RuntimeError:  # its error for an argument that was never set
            context.get_parallel().override_permanently(tp_group=SimpleNamespace(world_size=1))
        if not hasattr(modules.align, "sgl_moe_align_block_size"):
            modules.align.sgl_moe_align_block_size = _align
        return modules


def _align(
    topk_ids: Tensor, num_experts: int, block_size: int, sorted_ids: Tensor, expert_ids: Tensor, num_post: Tensor,
    cumsum: Tensor, pad: bool, ignore_invalid: bool = False,
) -> None:  # fmt: skip
    """Under the name of the compiled operator that a CPU has not: SGLang's Triton kernel for small batches, and torch
    for those whose pairs make too large a table. num_experts counts a bucket for -1, the first."""
    pairs = topk_ids.numel()
    if 0 < pairs <= MOST_ALIGNED:
        small = importlib.import_module("sglang.kernels.ops.moe.moe_align_small_numel")
        return small.moe_align_small_numel(topk_ids, num_experts, block_size, sorted_ids, expert_ids, num_post)
    bucket, order = torch.sort(topk_ids.flatten().long() + 1, stable=True)
    counts = torch.bincount(bucket, minlength=num_experts)
    blocks = (counts + block_size - 1) // block_size
    owners = torch.repeat_interleave(torch.arange(-1, num_experts - 1), blocks)
    shift = (blocks.cumsum(0) - blocks) * block_size - (counts.cumsum(0) - counts)
    sorted_ids.fill_(pairs)
    sorted_ids[shift[bucket] + torch.arange(pairs)] = order.int()
    expert_ids[: len(owners)] = owners.int()
    num_post.fill_(len(owners) * block_size)


class SglangTriton:
    name = "sglang-triton"
    devices = {"cpu", "cuda", "xpu"}
    interpreted = True
    batch_invariant = False  # tiles are chosen by the number of tokens

    def available(self) -> str | None:
        """None, or why it cannot be used here. Imports nothing."""
        if reason := missing("sglang", since=OLDEST):
            return reason
        if (torch.cuda.is_available() or torch.xpu.is_available()) and find_spec("sgl_kernel") is None:
            return "the package sgl_kernel is not installed; SGLang's fused_moe imports its operators on a GPU"
        return None

    def supports(self, problem: Any, device: str | None = None) -> str | None:
        """None or "<keyword>: reason": what fused_experts refuses by an assertion, or has no parameter for."""
        if problem.layout != "nk":
            return f"layout: {problem.layout}; w1 is [E, 2I, K] and w2 [E, K, I], asserted to be contiguous"
        if problem.padded:
            return "shape: hidden_states are asserted to be contiguous"
        if problem.shared_experts:
            return "shared_experts: SGLang gives them ids of their own when it routes"
        if problem.routing == "beyond":
            return BEYOND
        if problem.limit is not None and problem.activation != "swigluoai":
            return "activation: silu's swiglu_limit is asserted to be 10, gemm1_clamp_limit clamps silu(gate), not gate"
        if device == "xpu" and problem.activation != "silu":
            return "activation: on an XPU, SGLang asserts silu for this path"
        if device in (None, "cpu") and problem.activation == "swigluoai" and problem.dtype != "fp32":
            return f"activation: uncompiled, swigluoai rounds every operation to {problem.dtype}; no plan says so"
        if device == "cuda" and problem.gated and problem.activation != "swigluoai":
            wide = _vector_bytes() // DTYPES[problem.dtype].itemsize
            if problem.intermediate_size % wide:
                return (
                    f"shape: intermediate_size={problem.intermediate_size}; its activation checks for vectors of {wide}"
                )
        return self._quant_refusal(problem, device)

    def _quant_refusal(self, problem: Any, device: str | None) -> str | None:
        quant = problem.quant
        if quant is None:
            return None
        if quant.weight_format != "e4m3" or (quant.weight, quant.activation) not in SCHEMES:
            return f"quant: {quant}; of fp8, fused_experts multiplies e4m3 by e4m3 with scales of its own kind"
        if quant.weight != "block":
            return "quant: SGLang has no such quantizer on a CPU" if device in (None, "cpu") else None
        for name in ("hidden_size", "intermediate_size"):
            if getattr(problem, name) % BLOCK:
                return f"shape: {name}={getattr(problem, name)}; groups of {BLOCK} are asserted"
        return None

    def plans(self, problem: Any) -> list[dict]:
        """Products are stored in io, weighted before that, and summed in float32. act(gate) is rounded where torch
        multiplies it by up, not where SGLang's operator does."""
        plan = {"gate_up": "io", "act": "io", "slot": "io", "tf32": "truncated" if problem.dtype == "fp32" else False}
        if problem.router_weight_on_input:
            plan["weighted_input"] = "product"
        chained = problem.activation in ("silu", "gelu", "gelu_tanh")
        return [plan, {**plan, "act_chain": True}] if chained else [plan]

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k] float32, topk_ids [T, k], out=None) -> [T, K] io."""
        sglang = import_sglang()

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            problem, quant = layer.problem, layer.problem.quant
            topk_ids = local_ids(topk_ids, layer.expert_map)
            oai = problem.activation == "swigluoai"
            block = [BLOCK, BLOCK] if quant and quant.weight == "block" else None
            interpreted = hidden_states.device.type == "cpu"
            tiles = _default_tiles(sglang, layer, len(hidden_states), block) if interpreted else nullcontext()
            function = sglang.fused_moe.fused_experts_impl
            if oai and not interpreted:
                # The registered operator around it: torch compiles nothing, as this activation, in a dispatch mode,
                # such as one that traces, and an operator's inside is out of the mode.
                function = sglang.fused_moe.outplace_fused_experts
            with tiles:
                result = function(
                    hidden_states, layer.w13, layer.w2, topk_weights, topk_ids, layer.w13_bias, layer.w2_bias,
                    activation=ACTIVATIONS[problem.activation], is_gated=problem.activation != "relu2",
                    apply_router_weight_on_input=problem.router_weight_on_input, use_fp8_w8a8=quant is not None,
                    per_channel_quant=bool(quant and quant.weight == "channel"), w1_scale=layer.w13_scale,
                    w2_scale=layer.w2_scale, a1_scale=layer.a13_scale, a2_scale=layer.a2_scale, block_shape=block,
                    gemm1_alpha=ALPHA if oai else None,
                    gemm1_limit=effective_limit(problem.activation, problem.limit) if oai else None,
                    filter_expert=layer.expert_map is not None,
                )  # fmt: skip
            return result if out is None else out.copy_(result)

        return call


def _vector_bytes() -> int:
    return 32 if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 10 else 16  # from Blackwell on


def _default_tiles(sglang: SimpleNamespace, layer: Any, tokens: int, block: list[int] | None) -> Any:
    """SGLang's default tiles, stated: to look for tuned ones it asks for the name of a GPU."""
    experts, hidden, inner = layer.w2.shape
    dtype = "fp8_w8a8" if layer.problem.quant else None
    return sglang.utils.override_config(
        sglang.tiles.get_default_config(tokens, experts, inner, hidden, 1, dtype, False, block)
    )
