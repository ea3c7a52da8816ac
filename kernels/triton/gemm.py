"""The grouped GEMM of both layers: C[pair] = A[row of pair] @ W[expert of pair]^T, scaled, biased, weighted.

Two ways to find the pairs of a tile of BLOCK_M rows:

    aligned      sorted_token_ids, cut into blocks of one expert each (kernels.triton.align)
    low latency  no sorting: tile m serves pair m alone, and its other rows are idle

A GEMM with few tiles can be split along K (GemmConfig.split_k): every part stores its float32 sums, and a second launch
of the same kernel adds them up in order, without atomics, and does the epilogue.

Offsets: what grows with the model or the batch (expert * stride, row * stride, first column * stride) is computed in
int64 once per tile; what stays inside a tile is int32, to save registers.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from kernels.checks import SCALE_BLOCK


@triton.jit
def _tile_of(pid, num_m, num_n, GROUP_M: tl.constexpr):
    """(m, n) of a program: GROUP_M row tiles share their columns before the next columns begin, so that W is reused
    from cache. The last group may have fewer row tiles, hence the minimum."""
    per_group = GROUP_M * num_n
    first_m = pid // per_group * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + pid % per_group % rows, pid % per_group // rows


@triton.jit
def _pairs_of(sorted_token_ids_ptr, pid_m, num_pairs, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr):
    """The pair of each row of the tile; num_pairs marks a row without one."""
    lane = tl.arange(0, BLOCK_M)
    if ALIGNED:
        pairs = tl.load(sorted_token_ids_ptr + pid_m.to(tl.int64) * BLOCK_M + lane)
    else:
        pairs = tl.where(lane == 0, pid_m, num_pairs)
    return pairs


@triton.jit(do_not_specialize=["num_pairs", "num_tiles_m"])
def _moe_gemm_kernel(
    a_ptr, w_ptr, c_ptr, a_scale_ptr, w_scale_ptr, bias_ptr, router_weight_ptr,
    sorted_token_ids_ptr, expert_ids_ptr, num_tokens_post_padded_ptr, partial_ptr,
    num_pairs, num_tiles_m, num_experts, N, K, pairs_per_row,
    stride_am, stride_we, stride_wn, stride_wk, stride_cm,
    stride_asm, stride_ask, stride_wse, stride_wsn, stride_wsk, stride_be, stride_bn,
    ALIGNED: tl.constexpr, A_SCALE: tl.constexpr, W_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROUTER_WEIGHT: tl.constexpr, SCALE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, PHASE: tl.constexpr,
):  # fmt: skip
    """A [*, K] rows, W [E, N, K] by strides, C [pairs, N]. See `moe_gemm` for the rest.

    A_SCALE none|tensor|token|group, W_SCALE none|tensor|channel|block, ROUTER_WEIGHT none|input|output.
    PHASE whole; or multiply, which leaves the sums of one of SPLIT_K parts of K in partial [SPLIT_K, pairs, N] float32
    (the part is program_id(1)), and finish, which goes on from there.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    num_m = num_tiles_m
    if ALIGNED:
        num_m = tl.load(num_tokens_post_padded_ptr) // BLOCK_M
    pid = tl.program_id(0)
    if pid >= num_m * num_n:
        return
    pid_m, pid_n = _tile_of(pid, num_m, num_n, GROUP_M)

    pairs = _pairs_of(sorted_token_ids_ptr, pid_m, num_pairs, ALIGNED, BLOCK_M)
    row_mask = pairs < num_pairs
    pairs = pairs.to(tl.int64)
    first_n = pid_n.to(tl.int64) * BLOCK_N
    lane_n = tl.arange(0, BLOCK_N)
    col_mask = lane_n < N - pid_n * BLOCK_N
    out_mask = row_mask[:, None] & col_mask[None, :]
    c_ptrs = c_ptr + (pairs * stride_cm)[:, None] + (first_n + lane_n)[None, :]

    expert = tl.load(expert_ids_ptr + pid_m).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        # Blocks of invalid pairs exist only if the caller wants their rows defined: as zeros. In the low
        # latency path no kernel reads the row of an invalid pair.
        if ALIGNED:
            tl.store(c_ptrs, tl.zeros([BLOCK_M, BLOCK_N], c_ptr.dtype.element_ty), mask=out_mask)
        return

    rows = pairs // pairs_per_row
    lane_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (rows * stride_am)[:, None] + lane_k[None, :]
    w_base = w_ptr + expert * stride_we + first_n * stride_wn
    w_ptrs = w_base + (lane_n * stride_wn)[None, :] + (lane_k * stride_wk)[:, None]
    w_scale_base = w_scale_ptr + expert * stride_wse
    if A_SCALE == "group" or A_SCALE == "token":
        a_scale_ptrs = a_scale_ptr + rows * stride_asm
    if W_SCALE == "block":
        # Scales follow the row index of the whole matrix: a block may straddle gate and up, or two tiles.
        w_scale_ptrs = w_scale_base + (first_n + lane_n) // SCALE_BLOCK * stride_wsn

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    partial_ptrs = partial_ptr + (pairs * N)[:, None] + (first_n + lane_n)[None, :]
    of_a_part = num_pairs.to(tl.int64) * N
    if PHASE == "finish":
        for part in range(0, SPLIT_K):
            acc += tl.load(partial_ptrs + part * of_a_part, mask=out_mask, other=0.0)
    else:
        start_k = 0
        if PHASE == "multiply":
            start_k = tl.program_id(1) * BLOCK_K
            a_ptrs += start_k
            w_ptrs += start_k.to(tl.int64) * stride_wk
        for first_k in range(start_k, K, SPLIT_K * BLOCK_K):
            k_mask = lane_k < K - first_k
            # Rows without a pair load zeros, not some other row: what they hold must reach no sum and no NaN check.
            a = tl.load(a_ptrs, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=k_mask[:, None] & col_mask[None, :], other=0.0)
            if W_SCALE != "none" and A_SCALE == "none":
                w = w.to(a_ptr.dtype.element_ty)  # W8A16: exact, the scale waits for the float32 accumulator
            if A_SCALE == "group" or W_SCALE == "block":
                # BLOCK_K divides SCALE_BLOCK, so a tile lies in one group of K.
                product = tl.dot(a, w, input_precision="ieee")
                group = first_k // SCALE_BLOCK
                if A_SCALE == "group":
                    product *= tl.load(a_scale_ptrs + group * stride_ask, mask=row_mask, other=0.0)[:, None]
                if W_SCALE == "block":
                    product *= tl.load(w_scale_ptrs + group * stride_wsk, mask=col_mask, other=0.0)[None, :]
                acc += product
            elif A_SCALE != "none":
                # fp8 tensor cores of sm_90 keep few bits while they accumulate: move to float32 registers every tile.
                acc = tl.dot(a, w, acc, input_precision="ieee", max_num_imprecise_acc=BLOCK_K)
            else:
                acc = tl.dot(a, w, acc, input_precision="ieee")
            a_ptrs += SPLIT_K * BLOCK_K
            w_ptrs += SPLIT_K * BLOCK_K * stride_wk
    if PHASE == "multiply":
        tl.store(partial_ptrs + tl.program_id(1) * of_a_part, acc, mask=out_mask)
        return

    if A_SCALE == "tensor":
        acc *= tl.load(a_scale_ptr)
    if A_SCALE == "token":
        acc *= tl.load(a_scale_ptrs, mask=row_mask, other=0.0)[:, None]
    if W_SCALE == "tensor":
        acc *= tl.load(w_scale_base)
    if W_SCALE == "channel":
        acc *= tl.load(w_scale_base + (first_n + lane_n) * stride_wsn, mask=col_mask, other=0.0)[None, :]
    if ROUTER_WEIGHT == "input":
        acc *= tl.load(router_weight_ptr + pairs, mask=row_mask, other=0.0)[:, None]
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert * stride_be + (first_n + lane_n) * stride_bn
        acc += tl.load(bias_ptrs, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if ROUTER_WEIGHT == "output":
        acc *= tl.load(router_weight_ptr + pairs, mask=row_mask, other=0.0)[:, None]
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=out_mask)


@dataclasses.dataclass(frozen=True)
class GemmConfig:
    """Tile sizes. block_m is also the block size of the alignment; block_k divides 128 where scales vary along K.

    split_k: parts of K that different programs sum, for GEMMs with fewer tiles than the device has processors.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    num_stages: int = 3
    split_k: int = 1

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile}.g{self.group_m}.w{self.num_warps}.s{self.num_stages}.k{self.split_k}"


def default_config(num_pairs: int, num_experts: int, dtype: torch.dtype, quantized_weights: bool) -> GemmConfig:
    """Tiles for P pairs over E experts; `dtype` is that of the rows as they are multiplied.

    Every tile fits the 227 KiB of shared memory of sm_90. Block_m follows the mean number of pairs per expert, in few
    steps, since each value is one more compilation.
    """
    pairs_per_expert = num_pairs / num_experts
    block_m = next((m for m in (16, 32, 64) if pairs_per_expert <= m), 128)
    if dtype == torch.float32:
        # No tensor cores for IEEE float32: the accumulator and both operands live in registers.
        return GemmConfig(min(block_m, 32 if quantized_weights else 64), 64, 32, num_stages=2)
    # Few rows per expert: the weights' bandwidth is the limit, and deeper tiles keep more bytes in flight.
    block_k = 128 if quantized_weights or block_m <= 32 else 64
    return GemmConfig(block_m, 128, block_k, num_warps=4 if block_m <= 64 else 8)


def low_latency_config(dtype: torch.dtype) -> GemmConfig:
    """Tiles for one pair per row tile: the smallest block_m that tl.dot takes."""
    if dtype == torch.float32:
        return GemmConfig(16, 64, 32, group_m=1, num_stages=2)
    return GemmConfig(16, 64, 128, group_m=1)


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Which pairs a GEMM serves, by expert.

    sorted_token_ids and num_tokens_post_padded come from moe_align_block_size with block size config.block_m; both are
    None for the low latency path, where expert_ids is topk_ids.view(-1). num_pairs is P.
    """

    num_pairs: int
    expert_ids: torch.Tensor
    sorted_token_ids: torch.Tensor | None = None
    num_tokens_post_padded: torch.Tensor | None = None


def moe_gemm(
    a: torch.Tensor,
    w: torch.Tensor,
    out: torch.Tensor,
    assignment: Assignment,
    config: GemmConfig,
    *,
    pairs_per_row: int = 1,
    a_scale: torch.Tensor | None = None,
    a_granularity: str = "none",
    w_scale: torch.Tensor | None = None,
    w_granularity: str = "none",
    bias: torch.Tensor | None = None,
    router_weight: torch.Tensor | None = None,
    weight_on: str = "none",
) -> None:
    """out[p] = epilogue(a[p // pairs_per_row] @ w[expert of p]^T) for every pair p, accumulated in float32.

    a [rows, K] with dense rows; w [E, N, K] with any strides; out [P, N] contiguous, bf16, fp16 or fp32. In order, the
    epilogue multiplies by the scales, by router_weight [P] fp32 if weight_on == "input", adds bias [E, N], multiplies
    by router_weight if weight_on == "output", and rounds once to out's dtype.
    Scales are float32 with any strides: a_scale [1] (tensor), [rows] (token) or [rows, ceil(K/128)] (group); w_scale
    [E] (tensor), [E, N] (channel) or [E, ceil(N/128), ceil(K/128)] (block). fp8 w without a_scale is converted to the
    dtype of a.
    Rows of invalid pairs: zeros where the alignment kept them, otherwise not written. The caller has validated.
    """
    num_experts, n, k = w.shape
    aligned = assignment.sorted_token_ids is not None
    tiles_m = assignment.expert_ids.numel()
    tiles = tiles_m * triton.cdiv(n, config.block_n)
    if tiles == 0:
        return
    unused = assignment.expert_ids  # stands for every pointer that this specialization never follows
    ws = (*w_scale.stride(), 0, 0)[:3] if w_scale is not None else (0, 0, 0)
    as_ = (*a_scale.stride(), 0)[:2] if a_scale is not None else (0, 0)
    partial, phases = unused, [("whole", 1)]
    if config.split_k > 1:
        partial = torch.empty(config.split_k, assignment.num_pairs, n, dtype=torch.float32, device=out.device)
        phases = [("multiply", config.split_k), ("finish", 1)]
    for phase, parts in phases:
        _moe_gemm_kernel[(tiles, parts)](
            a, w, out,
            unused if a_scale is None else a_scale,
            unused if w_scale is None else w_scale,
            unused if bias is None else bias,
            unused if router_weight is None else router_weight,
            assignment.sorted_token_ids if aligned else unused,
            assignment.expert_ids,
            assignment.num_tokens_post_padded if aligned else unused,
            partial,
            assignment.num_pairs, tiles_m, num_experts, n, k, pairs_per_row,
            a.stride(0), *w.stride(), out.stride(0), *as_, *ws,
            *(bias.stride() if bias is not None else (0, 0)),
            ALIGNED=aligned, A_SCALE=a_granularity, W_SCALE=w_granularity, HAS_BIAS=bias is not None,
            ROUTER_WEIGHT=weight_on, SCALE_BLOCK=SCALE_BLOCK,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, GROUP_M=config.group_m,
            SPLIT_K=config.split_k, PHASE=phase, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
