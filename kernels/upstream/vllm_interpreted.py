"""Backend "vllm-triton-interpreted": vLLM's functional fused_experts on the CPU, its kernels in Triton's interpreter.

An emulation. fused_experts_impl, the Triton kernels and the rest of the Python are vLLM's own. This file replaces the
operators that vLLM compiles for GPUs only, in plain torch: alignment, activation, fp8 quantization, and the sum over
slots. A fault in a kernel or in the Python is vLLM's; faults of the real operators cannot show here.

vLLM takes Triton to be absent where no driver is active, unless CUDA_VISIBLE_DEVICES is empty: then one may yet come.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.grouped import activate, local_experts
from kernels.upstream import vllm_python
from kernels.upstream.vllm_python import MOE
from kernels.upstream.vllm_triton import VllmTriton

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_SCALE = 1 / (FP8_MAX * 512)


def moe_align_block_size(
    topk_ids: Tensor, num_experts: int, block_size: int, sorted_token_ids: Tensor, experts_ids: Tensor,
    num_tokens_post_pad: Tensor, expert_map: Tensor | None = None, scatter_idx: Tensor | None = None,
) -> None:  # fmt: skip
    """Places of the pairs by expert, whole blocks each. Invalid ids get none. What is beyond: padding, and -1."""
    experts = local_experts(topk_ids, num_experts, expert_map, num_experts).flatten()
    sorted_token_ids.fill_(topk_ids.numel())
    experts_ids.fill_(-1)
    block = 0
    for expert in range(num_experts):
        pairs = torch.nonzero(experts == expert).flatten()
        sorted_token_ids[block * block_size :][: len(pairs)] = pairs
        blocks = -(-len(pairs) // block_size)
        experts_ids[block : block + blocks] = expert
        block += blocks
    num_tokens_post_pad.fill_(block * block_size)


def moe_sum(slots: Tensor, output: Tensor, topk_ids: Tensor | None = None, expert_map: Tensor | None = None) -> None:
    """output [T, K] = the sum of slots [T, k, K]: of all of them, unless the ids say which have no expert."""
    assert topk_ids is None
    output.copy_(slots.float().sum(1))


def scaled_fp8_quant(
    x: Tensor, scale: Tensor | None = None, use_per_token_if_dynamic: bool = False
) -> tuple[Tensor, Tensor]:
    """e4m3 codes of x [M, N] and their scale: the argument, one a row, or one for all. NaN is never the largest."""
    wide = x.float()
    if scale is None:
        sizes = wide.abs().nan_to_num(0.0, torch.inf)
        amax = sizes.amax(1, keepdim=True) if use_per_token_if_dynamic else sizes.amax().view(1)
        scale = (amax / FP8_MAX).clamp(min=SMALLEST_SCALE) if use_per_token_if_dynamic else amax / FP8_MAX
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def apply_moe_activation(activation: Any, output: Tensor, x: Tensor) -> Tensor:
    """output [M, I] = the activation of x [M, 2I], computed in float32."""
    name = "relu2" if activation.value == "relu2_no_mul" else activation.value
    return output.copy_(activate(x.float(), name, None))


@cache
def import_interpreted() -> Any:
    """vLLM's fused_moe with its Triton kernels and these operators. RuntimeError if vLLM does not find Triton."""
    with vllm_python.quietly():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        fused_moe = vllm_python.import_module(f"{MOE}.fused_moe")
        operators = importlib.import_module("vllm._custom_ops")
    if not importlib.import_module("vllm.triton_utils").HAS_TRITON:
        raise RuntimeError(
            "vLLM was imported before, and took Triton for absent: its kernels need a process of their own"
        )
    for stand_in in (moe_align_block_size, moe_sum, scaled_fp8_quant):
        setattr(operators, stand_in.__name__, stand_in)
    fused_moe.apply_moe_activation = apply_moe_activation
    fused_moe.get_moe_configs = lambda *layer: None  # tuned tiles belong to a device's name: its defaults, then
    return fused_moe


class VllmTritonInterpreted(VllmTriton):
    """As vllm-triton, where there is no GPU."""

    name = "vllm-triton-interpreted"
    devices = {"cpu"}
    interpreted = True
    route = align = None  # type: ignore[assignment]  # operators, all of them

    def plans(self, problem: Any) -> list[dict]:
        """As on a GPU, with activations of one rounding, and float32 products in float32."""
        return [{**super().plans(problem)[0], "act_chain": False, "tf32": False}]

    def _fused_moe(self) -> Any:
        return import_interpreted()
