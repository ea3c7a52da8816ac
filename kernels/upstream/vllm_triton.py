"""Backends "vllm-triton" and "vllm-triton-modular": vLLM's Triton kernels, through both of its interfaces.

    vllm-triton            the functional fused_experts
    vllm-triton-modular    TritonExperts behind vLLM's modular kernel, which quantizes and weights the input first

Both need vLLM's compiled operators (activation, quantization, alignment, sum), so a GPU; vllm_interpreted.py does not.

Layout "nk", unchanged. The functional interface reads the layer at each call. prepare() makes the modular kernel, and
makes it again for another bias, scale or configuration, as vLLM does when weights are loaded again.

vLLM's router and alignment are tested by themselves: route() is fused_topk_bias and grouped_topk, align() is
moe_align_block_size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.layer import effective_limit
from kernels.upstream import vllm_python
from kernels.upstream.expert_ids import BEYOND
from kernels.upstream.package import missing
from kernels.upstream.vllm_python import MOE

OLDEST = (0, 33)
#: (weights, activations) that the Triton kernels multiply, in e4m3.
SCHEMES = {
    ("tensor", "tensor_static"), ("tensor", "tensor"), ("tensor", "token"), ("channel", "token"), ("block", "group"),
}  # fmt: skip
BLOCK = 128
MOST_EXPERTS = 991  #: rounded up to whole warps they must be fewer than 1024


class _VllmTriton:
    devices = {"cuda", "xpu"}
    batch_invariant: bool | str = False  # tiles are chosen by the number of tokens

    def available(self) -> str | None:
        """None, or why it cannot be used here. Imports nothing."""
        return missing("vllm", since=OLDEST)

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason": what both interfaces refuse by an assertion, or have no parameter for."""
        if problem.layout != "nk":
            return f"layout: {problem.layout}; vLLM's Triton kernels have w13 [E, 2I, K] and w2 [E, K, I] only"
        if problem.padded:
            return "shape: both ways assert that hidden_states is contiguous"
        if problem.shared_experts:
            return "shared_experts: a module of their own in vLLM"
        if (
            problem.quant
            and problem.quant.weight == "block"
            and (problem.hidden_size | problem.intermediate_size) % BLOCK
        ):
            return "shape: vLLM's quantizers refuse hidden and intermediate sizes that are no multiples of 128"
        if problem.num_experts > MOST_EXPERTS:
            return f"shape: moe_align_block_size raises beyond {MOST_EXPERTS} experts"
        if problem.routing == "beyond":
            return BEYOND
        return None

    def plans(self, problem: Any) -> list[dict]:
        """Products are stored in io, the router weight before that; the operator decides how to sum over slots: some
        sizes of top_k have a kernel that adds in io."""
        chain = problem.activation in ("silu", "gelu", "gelu_tanh")
        plan = {
            "gate_up": "io", "act": "io", "slot": "io", "act_chain": chain, "weight": "before_store",
            "router_weight": "fp32", "weighted_input": "product",
            "tf32": "truncated" if problem.dtype == "fp32" else False,
        }  # fmt: skip
        return [plan, {**plan, "act_chain": False}]


def route(
    logits: Tensor, top_k: int, method: str, renormalize: bool = False, scoring: str = "sigmoid", num_groups: int = 1,
    topk_groups: int = 1, routed_scaling_factor: float = 1.0, correction_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(topk_weights float32 [T, k], topk_ids int32 [T, k]) by vLLM's routers, for the length of hidden_states."""
    if num_groups > 1:
        router = vllm_python.import_module(f"{MOE}.router.grouped_topk_router")
        return router.grouped_topk(
            logits, logits, top_k, renormalize, num_groups, topk_groups, scoring, routed_scaling_factor, correction_bias
        )
    router = vllm_python.import_module(f"{MOE}.router.fused_topk_bias_router")
    scoring = {"softmax_topk": "softmax", "topk_softmax": "softmax", "sigmoid": "sigmoid"}.get(method, scoring)
    return router.fused_topk_bias(
        logits, logits, scoring, correction_bias, top_k, renormalize or method == "topk_softmax",
        routed_scaling_factor=routed_scaling_factor,
    )[:2]  # fmt: skip


def align(
    topk_ids: Tensor, block_size: int, num_experts: int, expert_map: Tensor | None = None,
    num_local_experts: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """vLLM's moe_align_block_size, which leaves invalid ids out; it does not use num_local_experts."""
    module = vllm_python.import_module(f"{MOE}.moe_align_block_size")
    return module.moe_align_block_size(topk_ids, block_size, num_experts, expert_map, ignore_invalid_experts=True)


class VllmTriton(_VllmTriton):
    name = "vllm-triton"
    batch_invariant = "configured"
    route = staticmethod(route)
    align = staticmethod(align)

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if refusal := super().supports(problem):
            return refusal
        if problem.limit is not None and problem.limit != effective_limit(problem.activation, None):
            return "activation: fused_experts has no parameter for a limit"
        quant = problem.quant
        if quant and (quant.weight_format != "e4m3" or (quant.weight, quant.activation) not in SCHEMES):
            return f"quant: {quant}; of fp8, fused_experts multiplies e4m3 by e4m3 with scales of its own kind"
        return None

    def configurations(self, problem: Any) -> dict[str, dict]:
        """vLLM's tiles for 1 to 2048 tokens where no file has tuned ones, and some whose row tiles share columns."""
        dtype = "fp8_w8a8" if problem.quant else None
        blocks = [BLOCK, BLOCK] if problem.quant and problem.quant.weight == "block" else None
        about = problem.num_experts, problem.intermediate_size, problem.hidden_size, problem.top_k, dtype, blocks
        chosen = [self._fused_moe().get_default_config(2**n, *about) for n in range(12)]
        chosen += [{**config, "GROUP_SIZE_M": 3} for config in (chosen[0], chosen[-1])]
        return {" ".join(map(str, config.values())): {"config": config} for config in chosen}

    def prepare(self, problem: Any, layer: Any, config: dict[str, int] | None = None) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k] float32, topk_ids [T, k], out=None) -> [T, K] io."""
        # Beneath torch.ops.vllm.fused_experts, which does nothing else but hide from a dispatch mode what is allocated.
        fused_experts_impl = self._fused_moe().fused_experts_impl
        vllm, tiles = vllm_python.import_vllm(), config
        override_config = vllm_python.import_module(MOE).override_config
        known = inspect.signature(fused_experts_impl).parameters

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            problem, quant = layer.problem, layer.problem.quant
            config = vllm.config.FusedMoEQuantConfig.make(
                quant_dtype=torch.float8_e4m3fn if quant else None, w1_scale=layer.w13_scale, w2_scale=layer.w2_scale,
                a1_scale=layer.a13_scale, a2_scale=layer.a2_scale, w1_bias=layer.w13_bias, w2_bias=layer.w2_bias,
                per_act_token_quant=bool(quant and quant.activation == "token"),
                per_out_ch_quant=bool(quant and quant.weight == "channel"),
                block_shape=[BLOCK, BLOCK] if quant and quant.weight == "block" else None,
            )  # fmt: skip
            with override_config(tiles) if tiles else nullcontext():
                result = fused_experts_impl(
                    hidden_states, layer.w13, layer.w2, topk_weights, topk_ids,
                    activation=vllm_python.activation(problem).value, global_num_experts=problem.num_experts,
                    apply_router_weight_on_input=problem.router_weight_on_input, expert_map=layer.expert_map,
                    per_channel_quant=config.per_act_token_quant,
                    **{name: getattr(config, name) for name in known if hasattr(config, name)},
                )  # fmt: skip
            return result if out is None else out.copy_(result)

        return call

    def _fused_moe(self) -> Any:
        return vllm_python.import_module(f"{MOE}.fused_moe")


class VllmTritonModular(_VllmTriton):
    name = "vllm-triton-modular"

    def declares(self, problem: Any) -> str | None:
        """None, or what TritonExperts.is_supported_config has against this problem. Imports vLLM."""
        return vllm_python.declares(self._experts(), problem, self._device())

    def supports(self, problem: Any) -> str | None:
        """None or "<keyword>: reason"."""
        if refusal := super().supports(problem):
            return refusal
        if (reason := self.declares(problem)) is not None:
            return f"{'quant' if 'quantization' in reason else 'activation'}: {reason}"
        return None

    def plans(self, problem: Any) -> list[dict]:
        """As the functional interface; a router weight on the input is cast to io, and so is what it scales."""
        on_input = {"weighted_input": "io", "router_weight": "io"} if problem.router_weight_on_input else {}
        return [{**plan, **on_input} for plan in super().plans(problem)]

    def prepare(self, problem: Any, layer: Any) -> Callable[..., Tensor]:
        """call(hidden_states [T, K] io, topk_weights [T, k] float32, topk_ids [T, k], out=None) -> [T, K] io."""
        vllm_python.init_workspace(layer.w13.device)
        kernel: Any = None
        known: Any = None
        loaded: tuple[Any, ...] = ()

        def call(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, out: Tensor | None = None) -> Tensor:
            nonlocal kernel, known, loaded
            problem, scales = layer.problem, (layer.w13_scale, layer.w2_scale)
            tensors = (*scales, layer.w13_bias, layer.w2_bias, layer.a13_scale, layer.a2_scale, layer.w13, layer.w2)
            about = replace(problem, tokens=0, routing="uniform", ids=32, padded=False)
            if kernel is None or about != known or any(a is not b for a, b in zip(tensors, loaded)):
                config = vllm_python.moe_config(problem, self._device())
                kernel = vllm_python.modular_kernel(self._experts(), "TRITON", problem, config, layer, scales)
                known, loaded = about, tensors
            result = kernel.apply(
                hidden_states, layer.w13, layer.w2, topk_weights=topk_weights, topk_ids=topk_ids,
                activation=vllm_python.activation(problem), global_num_experts=problem.num_experts,
                expert_map=layer.expert_map, apply_router_weight_on_input=problem.router_weight_on_input,
            )  # fmt: skip
            return result if out is None else out.copy_(result)

        return call

    def _experts(self) -> Any:
        return vllm_python.import_module(f"{MOE}.experts.triton_moe").TritonExperts

    def _device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "xpu"
