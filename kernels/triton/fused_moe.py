"""The layer: quantize, GEMM 1, activation, quantize, GEMM 2, and the sum over a token's slots.

`fused_moe` works on pairs in their natural order, `permuted_moe` on rows brought into expert order; the stages between
hidden_states and slots are the same code.
"""

import dataclasses

import torch

from kernels.checks import SCALE_BLOCK, require_one_of
from kernels.layer import ALPHA, Expert, Fp8Scheme, Layer, make_layer, require_tokens
from kernels.triton.activation import activate
from kernels.triton.align import moe_align_block_size
from kernels.triton.combine import moe_combine
from kernels.triton.gemm import Assignment, GemmConfig, default_config, low_latency_config, moe_gemm
from kernels.triton.permute import MoEPermuteScratch, moe_permute, moe_unpermute
from kernels.triton.quant import partial_amax, quantize_fp8

__all__ = ["Fp8Scheme", "GemmConfig", "fused_moe", "permuted_moe", "takes_low_latency_path"]

PATHS = ("auto", "aligned", "low_latency")


def takes_low_latency_path(num_tokens: int, top_k: int, num_experts: int, expert_map: torch.Tensor | None) -> bool:
    """Whether path "auto" skips the alignment: few pairs, nearly each with an expert of its own, and no expert map."""
    return expert_map is None and num_tokens * top_k * 4 <= num_experts


def fused_moe(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    limit: float | None = None,
    alpha: float = ALPHA,
    fp8: Fp8Scheme | None = None,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    a13_scale: torch.Tensor | None = None,
    a2_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    expert_map: torch.Tensor | None = None,
    num_experts: int | None = None,
    apply_router_weight_on_input: bool = False,
    layout: str = "nk",
    path: str = "auto",
    max_chunk_tokens: int | None = None,
    out: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:
    """The Mixture-of-Experts layer: out[t] = sum over valid slots of weight * expert(hidden_states[t]), [T, K].

    hidden_states [T, K] bf16, fp16 or fp32 with dense rows (a padded row stride is fine); never written.
    w13, w2: [E, 2I, K], [E, K, I] for layout "nk"; [E, K, 2I], [E, I, K] for "kn"; any strides; activation "relu2" has
    I for 2I. They have the dtype of hidden_states, or fp8 (e4m3fn or e5m2) with an `Fp8Scheme`.
    topk_weights float32 [T, k]; topk_ids int32 or int64 [T, k]; ids outside [0, num_experts) count for nothing.
    activation, limit, alpha: see `kernels.triton.activation.activate`.
    w13_scale, w2_scale float32 [E], [E, N] or [E, ceil(N/128), ceil(K/128)] as fp8.weight says (the last transposed
    with layout "kn"); a13_scale, a2_scale float32 [1]: static scales, for fp8.activation "tensor" only.
    w13_bias [E, 2I], w2_bias [E, K]: added in float32, after the scales.
    expert_map int32 [num_experts] -> local expert or -1; num_experts defaults to its length, or to E.
    apply_router_weight_on_input (top_k must be 1): weight * hidden_states is the input, instead of weight * the output.
    path: see `takes_low_latency_path`; "low_latency" cannot be forced with an expert_map. config: tiles of both GEMMs.
    max_chunk_tokens: serve so many tokens at a time, which bounds the memory of the stages between; not with dynamic
    per-tensor scales, which belong to the whole batch.
    out: [T, K], separate from hidden_states; written and returned.

    TypeError for dtypes, ValueError for everything else, before anything is written.
    """
    require_tokens(hidden_states, topk_weights, topk_ids, apply_router_weight_on_input, out)
    require_one_of("path", path, PATHS)
    layer = make_layer(
        hidden_states, w13, w2, activation=activation, limit=limit, alpha=alpha, fp8=fp8, w13_scale=w13_scale,
        w2_scale=w2_scale, a13_scale=a13_scale, a2_scale=a2_scale, w13_bias=w13_bias, w2_bias=w2_bias,
        expert_map=expert_map, num_experts=num_experts, layout=layout,
        apply_router_weight_on_input=apply_router_weight_on_input,
    )  # fmt: skip
    if path == "low_latency" and expert_map is not None:
        raise ValueError("path='low_latency' with an expert_map; valid with one: 'auto', 'aligned'")
    chunk = _chunk_tokens(hidden_states.shape[0], max_chunk_tokens, layer)
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if out is None else out
    if hidden_states.shape[0] == 0:
        return out
    batch = (hidden_states, topk_weights.contiguous(), topk_ids.contiguous(), out)
    # A batch that is not cut gets no views of itself: each would be an operator more before the first launch.
    parts = [batch] if chunk >= hidden_states.shape[0] else zip(*(tensor.split(chunk) for tensor in batch))
    for x, weights, ids, rows in parts:
        low_latency = path == "low_latency" or (
            path == "auto" and takes_low_latency_path(len(ids), ids.shape[1], layer.num_experts, expert_map)
        )
        slots = _slots(x, weights, ids, layer, low_latency, config)
        moe_combine(
            slots, ids, rows, num_experts=layer.num_experts, num_local_experts=layer.num_local_experts,
            expert_map=expert_map,
        )  # fmt: skip
    return out


def _chunk_tokens(num_tokens: int, max_chunk_tokens: int | None, layer: Layer) -> int:
    """Tokens of a chunk, at least one. ValueError where the batch cannot be cut."""
    if max_chunk_tokens is None:
        return max(1, num_tokens)
    if max_chunk_tokens < 1:
        raise ValueError(f"max_chunk_tokens={max_chunk_tokens}; valid: None, or 1 or more")
    if layer.fp8 and layer.fp8.activation == "tensor" and layer.w13.activation_scale is None:
        raise ValueError(f"max_chunk_tokens={max_chunk_tokens} with dynamic per-tensor scales; valid with them: None")
    return max_chunk_tokens


def permuted_moe(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    apply_router_weight_on_input: bool = False,
    out: torch.Tensor | None = None,
    config: GemmConfig | None = None,
    scratch: MoEPermuteScratch | None = None,
    **layer_arguments,
) -> torch.Tensor:
    """`fused_moe` by way of moe_permute and moe_unpermute: same arguments and result, other roundings.

    The router weight meets the stored slot, in the float32 sum of moe_unpermute. scratch: the permutation's buffers.
    layer_arguments: those of `fused_moe` that describe the layer, activation to layout; TypeError for any other.
    """
    require_tokens(hidden_states, topk_weights, topk_ids, apply_router_weight_on_input, out)
    layer = make_layer(
        hidden_states, w13, w2, apply_router_weight_on_input=apply_router_weight_on_input, **layer_arguments
    )
    if scratch is not None:
        scratch.validate(hidden_states, topk_ids)
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if out is None else out
    if hidden_states.shape[0] == 0:
        return out
    rows = moe_permute(
        hidden_states, topk_ids, layer.num_experts, expert_map=layer.expert_map, scratch=scratch,
        num_local_experts=layer.num_local_experts,
    )  # fmt: skip
    # From here on every row is a token of one slot, and ids are local. Rows without a pair have id -1.
    local = dataclasses.replace(layer, expert_map=None, num_experts=layer.num_local_experts)
    weights, amax = None, None
    if apply_router_weight_on_input:
        weights = topk_weights.reshape(-1)[rows.permuted_idx.clamp(min=0)]
    if layer.fp8 and layer.fp8.activation == "tensor" and layer.w13.activation_scale is None:
        # The scale belongs to the batch, not to the rows that happen to have a local expert.
        amax = partial_amax(hidden_states, topk_weights.reshape(-1) if apply_router_weight_on_input else None)
    slots = _slots(rows.hidden_states, weights, rows.expert_ids[:, None], local, False, config, amax)
    return moe_unpermute(slots, None if apply_router_weight_on_input else topk_weights, rows.inv_permuted_idx, out)


def _slots(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    ids: torch.Tensor,
    layer: Layer,
    low_latency: bool,
    config: GemmConfig | None,
    amax: torch.Tensor | None = None,
) -> torch.Tensor:
    """The expert outputs [P, K] of every valid pair of x [T, K] and ids [T, k]; those of invalid pairs stay unwritten.

    They are weighted unless weights is None or was applied on input. amax: see `quantize_fp8`, for x.
    """
    num_tokens, top_k = ids.shape
    num_pairs = num_tokens * top_k
    quantized = layer.fp8.activation if layer.fp8 else None
    config = config or _default_config(x, layer, num_pairs, low_latency, quantized)
    if layer.fp8 and SCALE_BLOCK % config.block_k:
        raise ValueError(f"config.block_k={config.block_k}; valid with fp8 weights: a divisor of {SCALE_BLOCK}")
    assignment = _assign(ids, layer, low_latency, config)
    on_input = weights if layer.weight_on_input else None

    def linear(rows, scale, granularity, expert: Expert, pairs_per_row, weight, weight_on):
        out = torch.empty(num_pairs, expert.w.shape[1], dtype=x.dtype, device=x.device)
        moe_gemm(
            rows, expert.w, out, assignment, config, pairs_per_row=pairs_per_row, a_scale=scale,
            a_granularity=granularity, w_scale=expert.scale, w_granularity=layer.fp8.weight if layer.fp8 else "none",
            bias=expert.bias, router_weight=weight, weight_on="none" if weight is None else weight_on,
        )  # fmt: skip
        return out

    if quantized:
        rows, scale = quantize_fp8(x, quantized, layer.w13.activation_scale, on_input, top_k, amax)
        h = linear(rows, scale, quantized, layer.w13, top_k, None, "none")
    else:
        h = linear(x, None, "none", layer.w13, top_k, on_input, "input")
    a = torch.empty(num_pairs, layer.w2.w.shape[2], dtype=x.dtype, device=x.device)
    activate(
        h, a, layer.activation, layer.limit, layer.alpha, ids, num_experts=layer.num_experts,
        num_local_experts=layer.num_local_experts, expert_map=layer.expert_map,
    )  # fmt: skip
    a_scale = None
    if quantized:
        a, a_scale = quantize_fp8(a, quantized, layer.w2.activation_scale)
    on_output = None if layer.weight_on_input else weights
    return linear(a, a_scale, quantized or "none", layer.w2, 1, on_output, "output")


def _assign(ids: torch.Tensor, layer: Layer, low_latency: bool, config: GemmConfig) -> Assignment:
    if low_latency:
        return Assignment(ids.numel(), ids.reshape(-1))
    sorted_token_ids, expert_ids, used = moe_align_block_size(
        ids, config.block_m, layer.num_experts, layer.expert_map, num_local_experts=layer.num_local_experts
    )
    return Assignment(ids.numel(), expert_ids, sorted_token_ids, used)


def _default_config(x, layer: Layer, num_pairs: int, low_latency: bool, quantized: str | None) -> GemmConfig:
    dtype = torch.float8_e4m3fn if quantized else x.dtype
    if low_latency:
        return low_latency_config(dtype)
    return default_config(num_pairs, layer.num_local_experts, dtype, layer.fp8 is not None)
